//! Kubernetes quantities as numbers.

/// The number that a quantity stands for; `None` if the text is none, or negative.
pub fn value(text: &str) -> Option<f64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..digits].parse().ok()?;
    let factor = match &text[digits..] {
        "m" => 1e-3,
        "" => 1.0,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "E" => 1e18,
        "Ki" => 2f64.powi(10),
        "Mi" => 2f64.powi(20),
        "Gi" => 2f64.powi(30),
        "Ti" => 2f64.powi(40),
        "Pi" => 2f64.powi(50),
        "Ei" => 2f64.powi(60),
        _ => return None,
    };
    Some(number * factor)
}

#[cfg(test)]
mod tests {
    use super::value;

    #[test]
    fn quantities_are_numbers() {
        for (text, expected) in [
            ("16Gi", Some(17_179_869_184.0)),
            ("1.5G", Some(1_500_000_000.0)),
            ("1Pi", Some(1_125_899_906_842_624.0)),
            ("12", Some(12.0)),
            ("500m", Some(0.5)),
            ("x", None),
            ("-1", None),
            ("1.5.2", None),
        ] {
            assert_eq!(value(text), expected, "{text}");
        }
    }
}
