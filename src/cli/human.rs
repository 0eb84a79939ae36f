//! For people: sizes, dates and tables.

/// A number of bytes with three digits or so: `0`, `512`, `64K`, `1.5G`.
#[must_use]
pub(super) fn bytes(bytes: u64) -> String {
    let mut unit = 0;
    // In tenths, rounded half up, so that no floating point is needed.
    let tenths = |unit: u32| {
        let divisor = 1_u128 << (10 * unit);
        (u128::from(bytes) * 10 + divisor / 2) / divisor
    };
    while tenths(unit) >= 10240 && unit < 6 {
        unit += 1;
    }
    let (tenths, unit) = (
        tenths(unit),
        ["", "K", "M", "G", "T", "P", "E"][usize::try_from(unit).unwrap_or(0)],
    );
    if tenths.is_multiple_of(10) || tenths >= 1000 {
        format!("{}{unit}", (tenths + 5) / 10)
    } else {
        format!("{}.{}{unit}", tenths / 10, tenths % 10)
    }
}

/// Seconds since 1970 as `2026-01-31 12:00:00` (UTC).
#[must_use]
pub(super) fn date(seconds: u64) -> String {
    let (days, rest) = (seconds / 86400, seconds % 86400);
    let (year, month, day) = civil(days);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}",
        rest / 3600,
        rest / 60 % 60,
        rest % 60
    )
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    let is_leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    // 146097 days are 400 years exactly.
    let mut year = 1970 + days / 146_097 * 400;
    let mut left = days % 146_097;
    loop {
        let len = 365 + u64::from(is_leap(year));
        if left < len {
            break;
        }
        left -= len;
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let mut month = 1;
    for len in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if left < len {
            break;
        }
        left -= len;
        month += 1;
    }
    (year, month, left + 1)
}

/// Rows under a heading. Columns whose heading begins with `>` are aligned to the right.
#[must_use]
pub(super) fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let is_right: Vec<bool> = heading.iter().map(|cell| cell.starts_with('>')).collect();
    let heading: Vec<String> = heading
        .iter()
        .map(|cell| cell.trim_start_matches('>').to_owned())
        .collect();
    let lines: Vec<&Vec<String>> = std::iter::once(&heading).chain(rows).collect();
    let widths: Vec<usize> = (0..heading.len())
        .map(|column| {
            let cells = lines.iter().filter_map(|line| line.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let mut out = String::new();
    for line in lines {
        let mut text = String::new();
        for ((cell, width), is_right) in line.iter().zip(&widths).zip(&is_right) {
            let padding = " ".repeat(width - cell.chars().count());
            if *is_right {
                text.push_str(&padding);
                text.push_str(cell);
            } else {
                text.push_str(cell);
                text.push_str(&padding);
            }
            text.push_str("  ");
        }
        out.push_str(text.trim_end());
        out.push('\n');
    }
    out
}

/// Names and values, a line each, the values under one another.
#[must_use]
pub(super) fn fields(fields: &[(&str, String)]) -> String {
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut out = String::new();
    for (name, value) in fields {
        out.push_str(&format!("{name:width$}  {value}\n"));
    }
    out
}

/// A size as people and programs want it: `1.5G (1610612736 bytes)`.
#[must_use]
pub(super) fn exact(count: u64) -> String {
    let rounded = bytes(count);
    if rounded == count.to_string() {
        format!("{count} bytes")
    } else {
        format!("{rounded} ({count} bytes)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_rounded_and_never_lie_by_a_unit() {
        for (count, text) in [
            (0, "0"),
            (512, "512"),
            (1023, "1023"),
            (1024, "1K"),
            (1536, "1.5K"),
            (65536, "64K"),
            (100 << 20, "100M"),
            ((1 << 30) - 1, "1G"),
            (3 << 29, "1.5G"),
            (u64::MAX, "16E"),
        ] {
            assert_eq!(bytes(count), text, "{count}");
        }
    }

    #[test]
    fn dates_follow_the_calendar() {
        assert_eq!(date(0), "1970-01-01 00:00:00");
        assert_eq!(date(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(date(1_700_000_000), "2023-11-14 22:13:20");
        assert_eq!(date(4_107_542_399), "2100-02-28 23:59:59");
        assert_eq!(date(4_107_542_400), "2100-03-01 00:00:00");
    }

    #[test]
    fn tables_align() {
        let rows = vec![
            vec!["a".to_owned(), "1".to_owned()],
            vec!["long".to_owned(), "100".to_owned()],
        ];
        let text = table(&["NAME", ">SIZE"], &rows);
        assert_eq!(text, "NAME  SIZE\na        1\nlong   100\n");
    }
}
