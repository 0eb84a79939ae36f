//! `--KEY VALUE` pairs, without a parser of their own to load.

use std::collections::HashMap;

use crate::Result;

/// The pairs given.
pub(crate) struct Args(HashMap<String, String>);

impl Args {
    /// Takes the pairs apart.
    ///
    /// # Errors
    /// A key without `--`, or without a value.
    pub(crate) fn parse(given: &[String]) -> Result<Self> {
        let mut pairs = HashMap::new();
        for pair in given.chunks(2) {
            let [key, value] = pair else {
                return Err(format!("{} needs a value", pair[0]).into());
            };
            let key = key
                .strip_prefix("--")
                .ok_or_else(|| format!("{key} is no --KEY"))?;
            pairs.insert(key.to_owned(), value.clone());
        }
        Ok(Self(pairs))
    }

    /// The value of `--key`.
    ///
    /// # Errors
    /// It is missing.
    pub(crate) fn text(&self, key: &str) -> Result<&str> {
        let value = self
            .0
            .get(key)
            .ok_or_else(|| format!("--{key} is missing"))?;
        Ok(value)
    }

    /// The value of `--key` as a number, with K, M, G or T as powers of 1024.
    ///
    /// # Errors
    /// It is missing or no number.
    pub(crate) fn number(&self, key: &str) -> Result<u64> {
        let text = self.text(key)?;
        let (digits, shift) = match text.as_bytes().last() {
            Some(b'K') => (&text[..text.len() - 1], 10),
            Some(b'M') => (&text[..text.len() - 1], 20),
            Some(b'G') => (&text[..text.len() - 1], 30),
            Some(b'T') => (&text[..text.len() - 1], 40),
            Some(_) | None => (text, 0),
        };
        let number: u64 = digits.parse().map_err(|e| format!("--{key} {text}: {e}"))?;
        number
            .checked_mul(1 << shift)
            .ok_or_else(|| format!("--{key} {text} is too large").into())
    }
}
