//! A loss curve as a static SVG: no script and no font of its own, readable on light and dark pages.

use super::Curve;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 400.0;
/// Left, right, top and bottom margins.
const MARGIN: [f64; 4] = [60.0, 20.0, 40.0, 44.0];
const INK: &str = "#6b7280";
const TRAIN: &str = "#2563eb";
const EVALUATION: &str = "#ea580c";

/// The picture; loss from 0, steps from 0.
pub fn svg(curve: &Curve, title: &str) -> String {
    let (train, evaluation) = (curve.train(), curve.evaluation());
    let all = || train.iter().chain(&evaluation);
    let largest = |value: fn(&(f64, f64)) -> f64| all().map(value).fold(0.0, f64::max);
    let (x_ticks, y_ticks) = (ticks(largest(|point| point.0)), ticks(largest(|point| point.1)));
    let [left, right, top, bottom] = MARGIN;
    let end = |ticks: &[f64]| ticks.last().copied().unwrap_or(1.0);
    let x = |step: f64| left + step / end(&x_ticks) * (WIDTH - left - right);
    let y = |loss: f64| HEIGHT - bottom - loss / end(&y_ticks) * (HEIGHT - top - bottom);
    let line = |points: &[(f64, f64)], colour: &str| {
        let path: Vec<String> = points.iter().map(|(step, loss)| format!("{:.1},{:.1}", x(*step), y(*loss))).collect();
        format!("<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"/>\n", path.join(" "))
    };
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\" fill=\"{INK}\">\n\
         <text x=\"{left}\" y=\"22\" font-size=\"15\" font-weight=\"bold\">{}</text>\n\
         <text x=\"{}\" y=\"22\" text-anchor=\"end\">loss (nats per token): \
         <tspan fill=\"{TRAIN}\">training</tspan> <tspan fill=\"{EVALUATION}\">validation</tspan></text>\n\
         <text x=\"{}\" y=\"{}\" text-anchor=\"middle\">step</text>\n",
        escape(title),
        WIDTH - right,
        WIDTH / 2.0,
        HEIGHT - 8.0
    );
    for tick in &y_ticks {
        let at = y(*tick);
        svg += &format!(
            "<line x1=\"{left}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"{INK}\" stroke-opacity=\"0.3\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{tick}</text>\n",
            WIDTH - right,
            left - 8.0,
            at + 4.0
        );
    }
    for tick in &x_ticks {
        svg += &format!(
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{tick}</text>\n",
            x(*tick),
            HEIGHT - bottom + 18.0
        );
    }
    svg += &line(&train, TRAIN);
    svg += &line(&evaluation, EVALUATION);
    for (step, loss) in &evaluation {
        svg += &format!("<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\" fill=\"{EVALUATION}\"/>\n", x(*step), y(*loss));
    }
    svg + "</svg>\n"
}

/// Round numbers from 0 to at least `largest`.
fn ticks(largest: f64) -> Vec<f64> {
    let largest = if largest > 0.0 { largest } else { 1.0 };
    let magnitude = 10_f64.powf((largest / 5.0).log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|factor| factor * magnitude * 5.0 >= largest).unwrap_or(10.0);
    let count = (largest / (factor * magnitude)).ceil() as i64;
    // Divided rather than multiplied: 3 × 0.1 is not 0.3.
    (0..=count).map(|index| index as f64 * factor / (1.0 / magnitude)).map(|tick| (tick * 1e9).round() / 1e9).collect()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover_the_range() {
        assert_eq!(ticks(4.3), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(ticks(0.29), [0.0, 0.1, 0.2, 0.3]);
        assert_eq!(ticks(40.0), [0.0, 10.0, 20.0, 30.0, 40.0]);
    }

    #[test]
    fn a_curve_is_a_line_and_evaluations_are_marked() {
        let mut curve = Curve::default();
        for (step, loss) in [(10, 4.0), (20, 2.0)] {
            curve.add_step(step, loss);
        }
        curve.add_evaluation(20, 2.0);
        let text = svg(&curve, "a < b");
        assert!(
            text.contains("<polyline points=\"400.0,40.0 740.0,198.0\" fill=\"none\" stroke=\"#2563eb\""),
            "{text}"
        );
        assert!(text.contains("<circle cx=\"740.0\" cy=\"198.0\" r=\"3.5\""), "{text}");
        assert!(text.contains("a &lt; b") && text.starts_with("<svg") && text.ends_with("</svg>\n"), "{text}");
        assert!(!svg(&Curve::default(), "nothing").contains("NaN"));
    }
}
