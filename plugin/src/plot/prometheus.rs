//! Loss against steps from Prometheus, whose own axis is time: two series of a pod, joined where they were scraped together.

use std::collections::BTreeMap;

use crds::FineTuneJob;
use k8s_openapi::jiff::Timestamp;
use kube::{Client, Config, ResourceExt};
use serde_json::Value;

use super::Curve;
use crate::error::{Error, causes};

/// Points of a range, below the 11,000 that Prometheus gives.
const POINTS: i64 = 4000;

/// Asks for the loss of a job from its creation to its end.
pub async fn curve(url: &str, job: &FineTuneJob) -> Result<Curve, Error> {
    let base: http::Uri = url.trim_end_matches('/').parse().map_err(|error| {
        Error::Usage(format!("--prometheus: found {url:?} ({error}), expected for example http://localhost:9090"))
    })?;
    if base.scheme().is_none() {
        return Err(Error::Usage(format!("--prometheus: found {url:?}, expected http:// or https:// before it")));
    }
    let client = Client::try_from(Config::new(base)).map_err(|error| broken(url, &error))?;
    let mut answers = Vec::new();
    for name in ["finetune_train_loss", "finetune_eval_loss", "finetune_step"] {
        let request = http::Request::get(path(name, job, Timestamp::now())).body(Vec::new());
        let request = request.map_err(|error| broken(url, &error))?;
        answers.push(client.request::<Value>(request).await.map_err(|error| broken(url, &error))?);
    }
    let [train, evaluation, steps] = answers.as_slice() else { unreachable!("three questions") };
    Ok(join(train, evaluation, steps))
}

fn broken(url: &str, error: &dyn std::error::Error) -> Error {
    let said = causes(error);
    Error::Broken(format!("{url}: no answer of Prometheus: {}", said.trim_start_matches("ServiceError: ")))
}

fn path(series: &str, job: &FineTuneJob, now: Timestamp) -> String {
    let (name, namespace) = (job.name_any(), job.namespace().unwrap_or_default());
    let query = format!("{series}{{finetunejob=\"{name}\",namespace=\"{namespace}\"}}");
    let end = job.status.as_ref().and_then(|status| status.completion_time.as_ref()).map_or(now, |ended| ended.0);
    let start = job.metadata.creation_timestamp.as_ref().map_or(end, |created| created.0);
    let (start, end) = (start.as_second(), end.as_second());
    let step = ((end - start) / POINTS).max(1);
    format!("/api/v1/query_range?query={}&start={start}&end={end}&step={step}", encode(&query))
}

fn encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

/// Who was scraped, and when: whole milliseconds.
type Place = (i64, String);

/// The values of an answer, in the order of their time.
fn values(answer: &Value) -> BTreeMap<Place, f64> {
    let mut values = BTreeMap::new();
    for series in answer["data"]["result"].as_array().into_iter().flatten() {
        let mut labels: Vec<String> = series["metric"]
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(name, _)| *name != "__name__")
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        labels.sort();
        for pair in series["values"].as_array().into_iter().flatten() {
            let (Some(time), Some(value)) = (pair[0].as_f64(), pair[1].as_str().and_then(|text| text.parse().ok()))
            else {
                continue;
            };
            values.insert(((time * 1000.0) as i64, labels.join(",")), value);
        }
    }
    values
}

fn join(train: &Value, evaluation: &Value, steps: &Value) -> Curve {
    let (train, evaluation) = (values(train), values(evaluation));
    let mut curve = Curve::default();
    let mut last: BTreeMap<String, (f64, f64)> = BTreeMap::new();
    for (place, step) in values(steps) {
        let (loss, evaluated) =
            (train.get(&place).copied().unwrap_or(f64::NAN), evaluation.get(&place).copied().unwrap_or(f64::NAN));
        let (last_step, last_evaluated) = last.get(&place.1).copied().unwrap_or((0.0, 0.0));
        // A gauge that was not set yet is 0, and one that was keeps its value until the next step.
        if loss != 0.0 && !loss.is_nan() && step >= 1.0 && step > last_step {
            curve.add_step(step as i64, loss);
        }
        if evaluated != 0.0 && !evaluated.is_nan() && evaluated != last_evaluated {
            curve.add_evaluation(step as i64, evaluated);
        }
        last.insert(place.1, (step, evaluated));
    }
    curve
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::fixture::{finished, now};

    #[test]
    fn the_question_names_job_namespace_and_time() {
        assert_eq!(
            path("finetune_step", &finished(), now()),
            "/api/v1/query_range?query=finetune_step%7Bfinetunejob%3D%22support-bot%22%2Cnamespace%3D%22team-a%22%7D\
             &start=1795514400&end=1795518000&step=1"
        );
    }

    fn answer(name: &str, pods: &[(&str, &[(f64, &str)])]) -> Value {
        let result: Vec<Value> = pods
            .iter()
            .map(|(pod, values)| json!({"metric": {"__name__": name, "pod": pod}, "values": values}))
            .collect();
        json!({"status": "success", "data": {"resultType": "matrix", "result": result}})
    }

    #[test]
    fn series_are_joined_by_pod_and_time() {
        let steps: [(&str, &[(f64, &str)]); 2] =
            [("a", &[(1.0, "0"), (2.0, "1"), (3.0, "4"), (4.0, "4")]), ("b", &[(5.0, "2"), (6.0, "3")])];
        let train: [(&str, &[(f64, &str)]); 2] =
            [("a", &[(1.0, "0"), (2.0, "2.5"), (3.0, "2"), (4.0, "2")]), ("b", &[(5.0, "0"), (6.0, "2.1")])];
        let evaluation: [(&str, &[(f64, &str)]); 2] =
            [("a", &[(1.0, "0"), (2.0, "0"), (3.0, "0"), (4.0, "2.25")]), ("b", &[(5.0, "0"), (6.0, "NaN")])];
        let curve = join(
            &answer("finetune_train_loss", &train),
            &answer("finetune_eval_loss", &evaluation),
            &answer("finetune_step", &steps),
        );
        assert_eq!(curve.train(), [(1.0, 2.5), (3.0, 2.1)], "the second pod went on from step 2");
        assert_eq!(curve.evaluation(), [], "what was evaluated at step 4 was lost with it");
        assert!(join(&json!({}), &json!({}), &json!({})).is_empty());
    }
}
