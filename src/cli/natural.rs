//! The order people expect of names: numbers in them count as numbers, so `vm-2` is before `vm-10`.

use std::cmp::Ordering;

/// Compares two names. Names that differ only in leading zeros follow the order of their bytes.
#[must_use]
pub(super) fn compare(a: &str, b: &str) -> Ordering {
    let (mut one, mut other) = (a, b);
    loop {
        let order = match (number(one), number(other)) {
            (Some((first, rest)), Some((second, other_rest))) => {
                (one, other) = (rest, other_rest);
                // Without leading zeros the longer number is the larger.
                let by_len = first.len().cmp(&second.len());
                by_len.then_with(|| first.cmp(second))
            }
            (Some(_), None) | (None, Some(_)) | (None, None) => {
                take_char(&mut one).cmp(&take_char(&mut other))
            }
        };
        if order != Ordering::Equal {
            return order;
        }
        if one.is_empty() && other.is_empty() {
            return a.cmp(b);
        }
    }
}

/// The number that `text` begins with, less leading zeros, and what follows it.
fn number(text: &str) -> Option<(&str, &str)> {
    let len = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, rest) = text.split_at(len);
    (len > 0).then(|| (number.trim_start_matches('0'), rest))
}

fn take_char(text: &mut &str) -> Option<char> {
    let first = text.chars().next()?;
    *text = &text[first.len_utf8()..];
    Some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_names_count_as_numbers() {
        // `vm-01` and `vm-1` are one number: their bytes decide.
        let expected = [
            "", "9", "10", "a", "a@s2", "a@s10", "vm", "vm-01", "vm-1", "vm-2", "vm-2a", "vm-10",
            "vm-10b2", "vm-10b10", "vmx",
        ];
        let mut names = expected;
        names.reverse();
        names.sort_by(|a, b| compare(a, b));
        assert_eq!(names, expected);
    }

    #[test]
    fn it_is_an_order() {
        let names = [
            "", "0", "00", "a", "a0", "a00", "a1", "a01", "1a", "01a", "a-1", "a@1",
        ];
        for a in names {
            for b in names {
                assert_eq!(compare(a, b), compare(b, a).reverse(), "{a} {b}");
                assert_eq!(compare(a, b) == Ordering::Equal, a == b, "{a} {b}");
                for c in names {
                    if compare(a, b).is_lt() && compare(b, c).is_lt() {
                        assert!(compare(a, c).is_lt(), "{a} < {b} < {c}");
                    }
                }
            }
        }
    }
}
