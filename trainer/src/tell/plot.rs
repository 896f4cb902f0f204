//! The loss curve as a static SVG: no script, no font of its own, readable on light and dark pages.

use std::fmt::Write;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 48.0;
const INK: &str = "#6b7280";
const GRID: &str = "#9ca3af";
const TRAIN: &str = "#2563eb";
const EVALUATION: &str = "#ea580c";

/// Train loss (thin, and smoothed), and validation loss with markers, against the step.
pub fn loss_svg(train: &[(f64, f64)], evaluation: &[(f64, f64)], title: &str) -> String {
    let all = || train.iter().chain(evaluation);
    let last_step = all().map(|(step, _)| *step).fold(1.0, f64::max);
    let highest = all().map(|(_, loss)| *loss).fold(0.0, f64::max);
    let y_ticks = ticks(if highest > 0.0 { highest } else { 1.0 }, 6);
    let x_ticks = ticks(last_step, 8);
    let top = y_ticks.last().copied().unwrap_or(1.0).max(highest);
    let x = |step: f64| LEFT + step / last_step * (WIDTH - LEFT - RIGHT);
    let y = |loss: f64| HEIGHT - BOTTOM - loss / top * (HEIGHT - TOP - BOTTOM);

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\" fill=\"{INK}\">\n\
         <text x=\"{LEFT}\" y=\"24\" font-size=\"15\" font-weight=\"bold\">{}</text>\n",
        escape(title)
    );
    for tick in &y_ticks {
        let (at, right) = (y(*tick), WIDTH - RIGHT);
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"{GRID}\" stroke-opacity=\"0.35\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            at + 4.0,
            label(*tick)
        );
    }
    for tick in x_ticks.iter().filter(|tick| **tick <= last_step) {
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            x(*tick),
            HEIGHT - BOTTOM + 18.0,
            label(*tick)
        );
    }
    let (middle_x, middle_y) = (f64::midpoint(LEFT, WIDTH - RIGHT), f64::midpoint(TOP, HEIGHT - BOTTOM));
    let _ = writeln!(
        svg,
        "<text x=\"{middle_x}\" y=\"{:.1}\" text-anchor=\"middle\">step</text>\n\
         <text transform=\"translate(16 {middle_y}) rotate(-90)\" text-anchor=\"middle\">loss (nats per token)</text>",
        HEIGHT - 10.0
    );
    let line = |points: &[(f64, f64)], colour: &str, width: f64, opacity: f64| {
        let path: Vec<String> = points.iter().map(|(step, loss)| format!("{:.1},{:.1}", x(*step), y(*loss))).collect();
        format!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\" stroke-opacity=\"{opacity}\" \
             stroke-linejoin=\"round\"/>\n",
            path.join(" ")
        )
    };
    svg.push_str(&line(train, TRAIN, 1.0, 0.35));
    svg.push_str(&line(&smoothed(train), TRAIN, 2.0, 1.0));
    svg.push_str(&line(evaluation, EVALUATION, 2.0, 1.0));
    for (step, loss) in evaluation {
        let _ =
            writeln!(svg, "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\" fill=\"{EVALUATION}\"/>", x(*step), y(*loss));
    }
    let mut at = WIDTH - RIGHT - 250.0;
    for (name, colour, shown) in
        [("training", TRAIN, !train.is_empty()), ("validation", EVALUATION, !evaluation.is_empty())]
    {
        if shown {
            let _ = writeln!(
                svg,
                "<rect x=\"{at}\" y=\"14\" width=\"16\" height=\"4\" fill=\"{colour}\"/><text x=\"{}\" y=\"20\">{name}</text>",
                at + 22.0
            );
            at += 120.0;
        }
    }
    svg.push_str("</svg>\n");
    svg
}

/// Exponential moving average over about a twentieth of the curve.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let weight = 2.0 / ((points.len() as f64 / 20.0).max(1.0) + 1.0);
    let mut average = points.first().map_or(0.0, |(_, loss)| *loss);
    points
        .iter()
        .map(|&(step, loss)| {
            average += weight * (loss - average);
            (step, average)
        })
        .collect()
}

/// Round numbers from 0 to at least `highest`, about `count` of them.
fn ticks(highest: f64, count: usize) -> Vec<f64> {
    let raw = highest / count as f64;
    let magnitude = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|factor| factor * magnitude).into_iter().find(|step| *step >= raw);
    let step = step.unwrap_or(raw);
    (0..=(highest / step).ceil() as i64).map(|index| index as f64 * step).collect()
}

fn label(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover_the_range() {
        assert_eq!(ticks(4.3, 6), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(ticks(0.9, 6).last(), Some(&1.0));
        assert_eq!((label(0.2), label(150.0)), ("0.2".to_owned(), "150".to_owned()));
    }

    #[test]
    fn an_empty_run_has_a_plot_too() {
        let svg = loss_svg(&[], &[], "nothing yet");
        assert!(svg.starts_with("<svg") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
