//! How numbers, times and tables are written. Pure; texts of others lose their control characters here.

use std::io::{self, Write};

use crate::error::Error;

/// Columns of a page.
pub const WIDTH: usize = 92;

/// Whether colours are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paint {
    /// With escape sequences.
    Colour,
    /// As they are.
    Plain,
}

impl Paint {
    fn with(self, code: &str, text: &str) -> String {
        match self {
            Self::Colour => format!("\x1b[{code}m{text}\x1b[0m"),
            Self::Plain => text.to_owned(),
        }
    }

    /// What went well.
    pub fn good(self, text: &str) -> String {
        self.with("32", text)
    }

    /// What did not.
    pub fn bad(self, text: &str) -> String {
        self.with("31", text)
    }

    /// What should be looked at.
    pub fn warn(self, text: &str) -> String {
        self.with("33", text)
    }

    /// What the eye should find.
    pub fn strong(self, text: &str) -> String {
        self.with("1", text)
    }

    /// What it may skip.
    pub fn faint(self, text: &str) -> String {
        self.with("2", text)
    }
}

/// Writes a result.
pub fn print(text: impl AsRef<[u8]>) -> Result<(), Error> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_ref()).and_then(|()| out.flush()).map_err(Error::Output)
}

/// Writes what is not a result. A reader that has gone away ends nothing.
pub fn tell(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// A decimal of the status with four digits behind the point at most; what is no number stays as it is.
pub fn decimal(text: &str) -> String {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && (value == 0.0 || value.abs() >= 1e-3) => {
            let text = format!("{value:.4}");
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        }
        Ok(value) if value.is_finite() => format!("{value:e}"),
        _ => clean(text),
    }
}

/// `81.0 %`
pub fn share(text: &str) -> String {
    text.parse::<f64>().map_or_else(|_| clean(text), |value| format!("{:.1} %", 100.0 * value))
}

/// `4,884,480`
pub fn count(value: i64) -> String {
    let digits = value.unsigned_abs().to_string();
    let mut text = if value < 0 { "-".to_owned() } else { String::new() };
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1.2 GiB`
pub fn bytes(value: i64) -> String {
    let (mut value, mut unit) = (value as f64, "B");
    for larger in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, larger);
    }
    if unit == "B" { format!("{value:.0} {unit}") } else { format!("{value:.1} {unit}") }
}

/// One line without control characters: what others wrote must not move the cursor.
pub fn clean(text: &str) -> String {
    let visible: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    visible.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Lines of at most `width` characters; a longer word has a line of its own.
pub fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in clean(text).split(' ') {
        let line = lines.last_mut().expect("there is one");
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

/// Where a column's text stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// Columns as wide as their widest cell, two spaces apart.
pub fn table(columns: &[(&str, Align)], rows: &[Vec<String>]) -> Vec<String> {
    let width = |index: usize| {
        let cells = rows.iter().map(|row| row[index].chars().count());
        cells.chain([columns[index].0.chars().count()]).max().unwrap_or(0)
    };
    let line = |cells: Vec<&str>| {
        let padded = cells.iter().enumerate().map(|(index, cell)| match columns[index].1 {
            Align::Left => format!("{cell:<0$}", width(index)),
            Align::Right => format!("{cell:>0$}", width(index)),
        });
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let header = line(columns.iter().map(|(name, _)| *name).collect());
    std::iter::once(header).chain(rows.iter().map(|row| line(row.iter().map(String::as_str).collect()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!(["1.913427", "0.0002", "0", "12", "NaN"].map(decimal), ["1.9134", "2e-4", "0", "12", "NaN"]);
        assert_eq!([0, 999, 4_884_480, -1000].map(count), ["0", "999", "4,884,480", "-1,000"]);
        assert_eq!([512, 1536, 1_288_490_189].map(bytes), ["512 B", "1.5 KiB", "1.2 GiB"]);
        assert_eq!(["0.8125", "?"].map(share), ["81.2 %", "?"]);
    }

    #[test]
    fn texts_of_others_stay_on_their_lines() {
        assert_eq!(clean("a\x1b[2J\nb\t c"), "a [2J b c");
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("hf://a-long-word b", 5), ["hf://a-long-word", "b"]);
        assert_eq!(wrap("", 5), [""]);
    }

    #[test]
    fn a_table_is_as_wide_as_its_cells() {
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["long".to_owned(), "12345".to_owned()]];
        let lines = table(&[("NAME", Align::Left), ("LOSS", Align::Right)], &rows);
        assert_eq!(lines, ["NAME   LOSS", "a         1", "long  12345"]);
    }
}
