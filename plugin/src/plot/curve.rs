//! Loss against steps, as three writers tell it: the record of the trainer, its log, Prometheus. Pure.

use std::collections::BTreeMap;

use serde_json::Value;

/// A loss curve. Steps that were done again after a resume replace those that were lost.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    train: BTreeMap<i64, f64>,
    evaluation: BTreeMap<i64, f64>,
}

impl Curve {
    /// Training loss by step.
    pub fn train(&self) -> Vec<(f64, f64)> {
        points(&self.train)
    }

    /// Validation loss by step.
    pub fn evaluation(&self) -> Vec<(f64, f64)> {
        points(&self.evaluation)
    }

    /// Whether there is nothing to draw.
    pub fn is_empty(&self) -> bool {
        self.train.is_empty() && self.evaluation.is_empty()
    }

    /// The training loss of the newest step.
    pub fn add_step(&mut self, step: i64, loss: f64) {
        // A step that was done before, or follows one that was: what came after it is lost.
        self.train.split_off(&step);
        self.evaluation.split_off(&step);
        if loss.is_finite() {
            self.train.insert(step, loss);
        }
    }

    /// The validation loss after a step.
    pub fn add_evaluation(&mut self, step: i64, loss: f64) {
        if loss.is_finite() {
            self.evaluation.insert(step, loss);
        }
    }

    /// The lines of `metrics.jsonl`. One that a crash cut short is the last.
    pub fn of_metrics(text: &str) -> Result<Self, String> {
        let mut curve = Self::default();
        let count = text.lines().count();
        for (number, line) in (1..).zip(text.lines()) {
            let entry: Value = match serde_json::from_str(line) {
                Ok(entry) => entry,
                Err(_) if number == count && number > 1 => break,
                Err(error) => return Err(format!("{number}: not a line of metrics.jsonl: {error}")),
            };
            let Some(step) = entry["step"].as_i64() else {
                return Err(format!("{number}: found no step, expected for example {{\"step\":1,\"loss\":2.5}}"));
            };
            if let Some(loss) = entry.get("loss") {
                curve.add_step(step, loss.as_f64().unwrap_or(f64::NAN));
            }
            if let Some(loss) = entry["eval_loss"].as_f64() {
                curve.add_evaluation(step, loss);
            }
        }
        Ok(curve)
    }

    /// The lines `step 3/10  loss 1.5 …` and `evaluation at step 3:  loss 1.5 …` of a trainer's log.
    pub fn add_log(&mut self, text: &str) {
        for line in text.lines() {
            let mut words = line.split_whitespace();
            if let Some(rest) = line.strip_prefix("evaluation at step ") {
                let step = rest.split(':').next().and_then(|step| step.parse().ok());
                if let (Some(step), Some(loss)) = (step, number_after(rest, "loss")) {
                    self.add_evaluation(step, loss);
                }
            } else if words.next() == Some("step") {
                let step = words.next().and_then(|step| step.split_once('/')?.0.parse().ok());
                if let (Some(step), Some(loss)) = (step, number_after(line, "loss")) {
                    self.add_step(step, loss);
                }
            }
        }
    }
}

fn points(values: &BTreeMap<i64, f64>) -> Vec<(f64, f64)> {
    values.iter().map(|(step, loss)| (*step as f64, *loss)).collect()
}

fn number_after(line: &str, name: &str) -> Option<f64> {
    let mut words = line.split_whitespace().skip_while(|word| *word != name);
    words.nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_as_the_trainer_writes_it() {
        let text = "\
{\"step\":1,\"epoch\":0.1,\"loss\":2.5,\"finite\":true}
{\"step\":2,\"loss\":null,\"finite\":false}
{\"step\":2,\"eval_loss\":2.25,\"best\":true}
{\"step\":3,\"loss\":2.0}
{\"step\":4,\"lo";
        let curve = Curve::of_metrics(text).expect("a record");
        assert_eq!(curve.train(), [(1.0, 2.5), (3.0, 2.0)]);
        assert_eq!(curve.evaluation(), [(2.0, 2.25)]);
        assert_eq!(
            Curve::of_metrics("{\"step\":1,\"loss\":2.5}\n{\"loss\":1}\n"),
            Err("2: found no step, expected for example {\"step\":1,\"loss\":2.5}".into())
        );
        let error = Curve::of_metrics("loss,step\n1,2\n").expect_err("not JSON");
        assert!(error.starts_with("1: not a line of metrics.jsonl: "), "{error}");
    }

    #[test]
    fn a_log_is_read_as_the_trainer_prints_it() {
        let first = "\
== training
step 1/40  loss 2.5000  900 tokens/s  1 min 2 s left
evaluation at step 2:  loss 2.2500  token accuracy 0.5000  (best so far)
step 4/40  loss 2.0000  eval 2.2500  900 tokens/s  58 s left
step 5/40  loss NaN  900 tokens/s  58 s left
warning: step by step loss 7
";
        let mut curve = Curve::default();
        curve.add_log(first);
        assert_eq!((curve.train(), curve.evaluation()), (vec![(1.0, 2.5), (4.0, 2.0)], vec![(2.0, 2.25)]));
        curve.add_log("resumed at step 2; exact\nstep 3/40  loss 2.1000  900 tokens/s  59 s left\n");
        assert_eq!(curve.train(), [(1.0, 2.5), (3.0, 2.1)], "what came after the checkpoint was lost");
        assert_eq!(curve.evaluation(), [(2.0, 2.25)]);
    }
}
