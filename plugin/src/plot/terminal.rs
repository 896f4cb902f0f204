//! A loss curve in characters: each Braille character is a field of 2 × 4 dots.

use super::Curve;

const COLUMNS: usize = 68;
const ROWS: usize = 16;
/// Columns of the numbers at the left.
const LABEL: usize = 8;
/// The first of 256 Braille characters; its eight low bits are dots.
const BRAILLE: u32 = 0x2800;
/// Bits of the dots of a character, by row and column.
const DOTS: [[u32; 2]; 4] = [[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]];

/// The curve with axes and numbers, 80 columns wide.
pub fn terminal(curve: &Curve, title: &str) -> String {
    draw(curve, title, COLUMNS, ROWS)
}

fn draw(curve: &Curve, title: &str, columns: usize, rows: usize) -> String {
    let (train, evaluation) = (curve.train(), curve.evaluation());
    let all = || train.iter().chain(&evaluation);
    let range = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)))
    };
    let (first, last) = range(&mut all().map(|(step, _)| *step));
    let (low, high) = range(&mut all().map(|(_, loss)| *loss));
    // One point, or a level line, still has a place on the axes.
    let (low, high) = if high > low { (low, high) } else { (low - 0.5, high + 0.5) };
    let width = if last > first { last - first } else { 1.0 };
    let (dots_x, dots_y) = ((columns * 2 - 1) as f64, (rows * 4 - 1) as f64);
    let place = |(step, loss): (f64, f64)| {
        (((step - first) / width * dots_x).round() as i64, ((high - loss) / (high - low) * dots_y).round() as i64)
    };

    let mut cells = vec![vec![0_u32; columns]; rows];
    let mut dot = |x: i64, y: i64| {
        let (x, y) = (x as usize, y as usize);
        cells[y / 4][x / 2] |= DOTS[y % 4][x % 2];
    };
    let mut previous = None;
    for (x, y) in train.iter().copied().map(place) {
        let (from_x, from_y) = previous.unwrap_or((x, y));
        let steps = (x - from_x).abs().max((y - from_y).abs()).max(1);
        for step in 0..=steps {
            dot(from_x + (x - from_x) * step / steps, from_y + (y - from_y) * step / steps);
        }
        previous = Some((x, y));
    }
    let mut lines: Vec<Vec<char>> = cells
        .iter()
        .map(|row| row.iter().map(|bits| if *bits == 0 { ' ' } else { braille(*bits) }).collect())
        .collect();
    for (x, y) in evaluation.iter().copied().map(place) {
        lines[y as usize / 4][x as usize / 2] = 'o';
    }

    let mut text = format!("{title}: loss (nats per token) by step; line: training, o: validation\n");
    for (row, line) in lines.iter().enumerate() {
        let is_labelled = row == 0 || row == rows - 1 || row == rows / 2;
        let value = high - (high - low) * row as f64 / (rows - 1) as f64;
        let (label, tick) = if is_labelled { (number(value), '┤') } else { (String::new(), '│') };
        let line: String = line.iter().collect();
        text += format!("{label:>LABEL$} {tick}{line}").trim_end();
        text.push('\n');
    }
    text += &format!("{:LABEL$} └{}\n", "", "─".repeat(columns));
    let middle = number(first + width / 2.0);
    let before = (columns - middle.len()) / 2;
    let start = number(first);
    let end = number(if last > first { last } else { first + 1.0 });
    let axis = format!("{start:<before$}{middle}");
    text += &format!("{:LABEL$}  {axis}{end:>width$}\n", "", width = columns - axis.len());
    text
}

fn braille(bits: u32) -> char {
    char::from_u32(BRAILLE + bits).unwrap_or(' ')
}

fn number(value: f64) -> String {
    let text = if value.abs() < 100.0 { format!("{value:.3}") } else { format!("{value:.0}") };
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_has_axes_and_numbers() {
        let mut curve = Curve::default();
        for step in 1..=9_i32 {
            curve.add_step(i64::from(step), 1.0 + 8.0 / f64::from(step));
        }
        curve.add_evaluation(5, 3.0);
        let expected = "\
bot: loss (nats per token) by step; line: training, o: validation
       9 ┤⢇
         │⠘⡄
   5.444 ┤ ⠱⣀
         │   ⠉⠢⢄⡀
   1.889 ┤      ⠈⠉⠉o⠒⠤⠤⠤⠤⢄⣀⣀
         └──────────────────
          1       5        9
";
        assert_eq!(draw(&curve, "bot", 18, 5), expected);
    }

    #[test]
    fn one_point_is_drawn_too() {
        let mut curve = Curve::default();
        curve.add_step(7, 2.0);
        let text = draw(&curve, "bot", 10, 3);
        assert!(text.contains("2.5 ┤") && text.contains("1.5 ┤"), "{text}");
        assert_eq!(text.chars().filter(|c| (0x2801..=0x28ff).contains(&(*c as u32))).count(), 1, "{text}");
    }
}
