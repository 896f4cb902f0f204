//! What dashboards and alerts ask, asked of a Prometheus that finds a real job by the chart's own configuration.

use std::collections::BTreeSet;
use std::process::Child;

use harness::cluster::{Cluster, MINUTE, wait_for};
use harness::operator::{FEW_MINUTES, Operator};
use jiff::Timestamp;
use serde_json::Value;

use crate::chart::alerts::alerts;
use crate::chart::dashboards::{DASHBOARDS, dashboard, queries, series_of_variable};
use crate::chart::series::{read, substituted};
use crate::chart::{self, chart};

/// Selectors that find nothing here, without the labels of a job, and why.
const ABSENT: [(&str, &str); 5] = [
    ("finetune_gpu_memory_allocated_bytes", "needs an accelerator"),
    ("finetune_gpu_utilization_ratio", "needs an accelerator"),
    ("finetune_gpu_energy_joules_total", "needs an accelerator"),
    ("finetunejob_waiting_since_timestamp_seconds{reason=\"NodeLost\"}", "no node is lost here"),
    ("finetune_checkpoints_total{result=\"error\"}", "comes with the first checkpoint that cannot be written"),
];

const ADDRESS: &str = "127.0.0.1:9090";

/// A Prometheus inside the cluster; it ends with the cluster.
struct Prometheus {
    cluster: &'static Cluster,
    _process: Child,
}

impl Prometheus {
    /// With the chart's configuration, except for its pace, and for its way to the API server: it is no pod.
    fn start(cluster: &'static Cluster) -> Self {
        let folder = cluster.run_dir().join("prometheus");
        std::fs::create_dir_all(&folder).expect("the run directory is writable");
        let kubeconfig = cluster.run_dir().join("pki/admin.kubeconfig");
        let mut config = chart::read(&chart().join("prometheus.yml"));
        for (count, from, to) in [
            (1, "scrape_interval: 15s", "scrape_interval: 1s".to_owned()),
            (1, "evaluation_interval: 30s", "evaluation_interval: 1s".to_owned()),
            (1, "alerts/alerts.yaml", chart().join("alerts/alerts.yaml").display().to_string()),
            (2, "{role: pod}", format!("{{role: pod, kubeconfig_file: {}}}", kubeconfig.display())),
        ] {
            assert_eq!(config.matches(from).count(), count, "{from} in {config}");
            config = config.replace(from, &to);
        }
        let file = folder.join("prometheus.yml");
        std::fs::write(&file, config).expect("the run directory is writable");
        let process = cluster.start_inside(
            "prometheus",
            &[
                "prometheus",
                &format!("--config.file={}", file.display()),
                &format!("--storage.tsdb.path={}", folder.join("data").display()),
                &format!("--web.listen-address={ADDRESS}"),
            ],
        );
        let prometheus = Self { cluster, _process: process };
        prometheus.until("finetune_operator_leader == 1");
        prometheus
    }

    /// The answer of an endpoint of its HTTP interface.
    fn try_ask(&self, endpoint: &str, parameters: &[(&str, &str)]) -> Result<Value, String> {
        let url = format!("http://{ADDRESS}/api/v1/{endpoint}");
        let mut arguments = vec!["curl".to_owned(), "-sS".into(), "--get".into(), url];
        for (name, value) in parameters {
            arguments.extend(["--data-urlencode".into(), format!("{name}={value}")]);
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let said = self.cluster.try_command("enter", &arguments)?;
        let answer: Value = serde_json::from_str(&said).map_err(|error| format!("{error}: {said}"))?;
        if answer["status"] == "success" { Ok(answer["data"].clone()) } else { Err(answer["error"].to_string()) }
    }

    /// Waits until an expression has a value now.
    fn until(&self, expression: &str) {
        wait_for(format!("Prometheus to have {expression}"), FEW_MINUTES, || {
            let found = self.try_ask("query", &[("query", expression)])?;
            if has_number(&found) { Ok(()) } else { Err(found.to_string()) }
        });
    }

    /// Whether an expression was a number at some second since `start`.
    fn had(&self, expression: &str, start: Timestamp) -> bool {
        let (start, end) = (start.to_string(), Timestamp::now().to_string());
        let parameters = [("query", expression), ("start", &start), ("end", &end), ("step", "1")];
        let found = self.try_ask("query_range", &parameters);
        has_number(&found.unwrap_or_else(|error| panic!("{expression}: {error}")))
    }
}

/// Whether there is a sample, and one that says something: a quantile of nothing is NaN.
fn has_number(found: &Value) -> bool {
    let series = found["result"].as_array().unwrap_or_else(|| panic!("no result: {found}"));
    let samples = series.iter().flat_map(|one| match one["values"].as_array() {
        Some(values) => values.iter().collect(),
        None => vec![&one["value"]],
    });
    samples.filter_map(|sample| sample[1].as_str()?.parse::<f64>().ok()).any(f64::is_finite)
}

#[test]
fn every_query_of_dashboards_and_alerts_finds_data() {
    let Some(operator) = Operator::shared() else { return };
    let space = operator.workspace("observed");
    let prometheus = Prometheus::start(operator.cluster);
    let namespace = space.namespace.name();
    let of = |name: &str| format!("namespace=\"{namespace}\",finetunejob=\"{name}\"");
    let start = Timestamp::now();

    // One job waits, one fails, and one trains: killed once, so that it resumes, and stopped once all of it was seen.
    space.job("waiting", "profile: nowhere");
    space.job(
        "bot",
        "checkpoint: {everySteps: 50}\nvalidation: {everySteps: 50, baselines: {zeroShot: false, fewShot: {examples: 0}}}\n\
         hyperparameters: {maxSteps: 100000, batchSize: 8, learningRate: \"1e-3\", precision: FP32}",
    );
    let bot = of("bot");
    let pod = space.trains("bot");
    prometheus.until(&format!("finetune_checkpoints_total{{{bot},pod=\"{pod}\",result=\"success\"}} > 1"));
    space.namespace.kill_container(&pod);
    let pod = space.trains_again("bot", 2);
    for seen in ["finetune_resumes_total", "finetune_eval_loss", "finetune_checkpoints_total"] {
        prometheus.until(&format!("{seen}{{{bot},pod=\"{pod}\"}} > 0"));
    }
    // A rate needs two.
    prometheus.until(&format!("count_over_time(finetune_checkpoints_total{{{bot},pod=\"{pod}\"}}[1m]) > 1"));
    space.patch("bot", "{\"stopRequested\": true}");
    space.succeeded("bot");
    space.inputs.write("train.jsonl", "not JSON\n");
    space.job("bad", "");
    space.ended("bad");
    prometheus.until(&format!("finetunejob_status_phase{{{bot},phase=\"Succeeded\"}} == 1"));
    prometheus.until(&format!("ALERTS{{alertname=\"FineTuneJobFailed\",alertstate=\"firing\",{}}}", of("bad")));

    let dashboards = DASHBOARDS.map(|(name, _)| dashboard(name));
    let asked: Vec<(&str, &str)> = dashboards.iter().flat_map(queries).collect();
    let alerts = alerts();
    let series = alerts.iter().map(|alert| chart::text(&alert["expr"]));
    let variables = dashboards.iter().flat_map(|dashboard| dashboard["templating"]["list"].as_array().expect("a list"));
    let variables = variables.filter(|variable| variable["type"] == "query").map(series_of_variable);

    // Each series by itself, as it is selected.
    let mut absent = BTreeSet::new();
    for query in asked.iter().map(|(_, query)| *query).chain(series).chain(variables) {
        for selector in read(query).selectors {
            // `read` has put names in for the variables.
            let here = selector.replace("\"team-a\"", &format!("\"{namespace}\"")).replace("\"support-bot\"", "\".*\"");
            if !prometheus.had(&here, start) {
                absent.insert(without_job(&selector));
            }
        }
    }
    let expected: BTreeSet<String> = ABSENT.iter().map(|(selector, _)| (*selector).to_owned()).collect();
    assert_eq!(absent, expected, "these selectors find nothing; those on the right are known for it: {ABSENT:?}");

    // Each query as a whole; of one that names such a selector there can be no data.
    for (title, query) in asked {
        let here = substituted(query, namespace, ".*");
        let lacks = read(query).selectors.iter().any(|selector| expected.contains(&without_job(selector)));
        assert_eq!(prometheus.had(&here, start), !lacks, "{title}: {here}");
    }

    // Each alert, as Prometheus itself evaluates it.
    let rules = wait_for("every alert to be evaluated", MINUTE, || {
        let found = prometheus.try_ask("rules", &[("type", "alert")])?;
        let groups = found["groups"].as_array().expect("groups");
        let rules: Vec<Value> =
            groups.iter().flat_map(|group| group["rules"].as_array().expect("rules")).cloned().collect();
        if rules.iter().all(|rule| rule["health"] != "unknown") { Ok(rules) } else { Err(found.to_string()) }
    });
    assert_eq!(rules.len(), alerts.len());
    for rule in rules {
        assert_eq!(rule["health"], "ok", "{rule:#}");
    }

    // The curve that a person sees.
    let plugin = harness::trainer_binary().with_file_name("kubectl-finetune");
    let plugin = plugin.to_str().expect("a UTF-8 path");
    let url = format!("http://{ADDRESS}");
    let plot = operator.cluster.command("enter", &[plugin, "-n", namespace, "plot", "bot", "--prometheus", &url]);
    assert!(plot.contains("bot") && plot.lines().count() > 10, "{plot}");
}

/// A selector without the labels that choose the job.
fn without_job(selector: &str) -> String {
    let Some((name, labels)) = selector.split_once('{') else { return selector.to_owned() };
    let labels = labels.trim_end_matches('}').split(',');
    let labels: Vec<&str> =
        labels.filter(|label| !["namespace=", "finetunejob="].iter().any(|chosen| label.starts_with(chosen))).collect();
    if labels.is_empty() { name.to_owned() } else { format!("{name}{{{}}}", labels.join(",")) }
}
