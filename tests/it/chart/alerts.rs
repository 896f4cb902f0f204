//! Alerts: their queries, their tests by promtool, their runbooks.

use std::collections::BTreeSet;
use std::path::PathBuf;

use harness::repository;
use serde_json::Value;

use super::{built, chart, objects, parse, read, render, run, series, text, the};

const RUNBOOKS: &str = "https://finetune.dev/docs/runbooks/";

fn rules() -> Value {
    parse(&read(&chart().join("alerts/alerts.yaml")))
}

/// Every alert.
pub fn alerts() -> Vec<Value> {
    let groups = rules()["groups"].as_array().expect("groups").clone();
    let alerts: Vec<Value> =
        groups.iter().flat_map(|group| group["rules"].as_array().expect("rules").clone()).collect();
    assert!(alerts.len() >= 9, "{alerts:?}");
    alerts
}

/// Every page of the folder.
pub fn runbooks() -> Vec<PathBuf> {
    let folder = repository().join("docs/runbooks");
    std::fs::read_dir(&folder).expect("the folder of runbooks").flatten().map(|file| file.path()).collect()
}

#[test]
fn alerts_name_our_series_and_no_pod() {
    for alert in alerts() {
        let query = series::read(text(&alert["expr"]));
        assert_eq!(query.problems, Vec::<String>::new(), "{}", alert["alert"]);
        for label in ["pod", "instance", "job"] {
            assert!(!text(&alert["expr"]).contains(&format!("({label})")), "{} keeps {label}", alert["alert"]);
        }
        for annotation in ["summary", "description"] {
            assert!(text(&alert["annotations"][annotation]).len() > 10, "{}", alert["alert"]);
        }
        assert!(["warning", "critical"].contains(&text(&alert["labels"]["severity"])), "{}", alert["alert"]);
    }
}

#[test]
fn each_alert_has_a_runbook_and_each_runbook_an_alert() {
    let mut expected = BTreeSet::new();
    for alert in alerts() {
        let name = text(&alert["alert"]);
        assert_eq!(text(&alert["annotations"]["runbook_url"]), format!("{RUNBOOKS}{name}.md"));
        let page = repository().join(format!("docs/runbooks/{name}.md"));
        let content = read(&page);
        for part in [&format!("# {name}\n"), "## What it means\n", "## How to look\n", "## What to do\n", "kubectl "] {
            assert!(content.contains(part), "{} has no {part:?}", page.display());
        }
        expected.insert(page);
    }
    assert_eq!(runbooks().into_iter().collect::<BTreeSet<_>>(), expected);
}

/// Links lead somewhere, and reasons in the first column of a table are reasons that a status can have.
#[test]
fn runbooks_name_what_exists() {
    let codes = crds::exit::ExitCode::ALL.iter().map(|code| code.reason());
    // What the kubelet says, and what the operator makes of a death without a word.
    let reasons: BTreeSet<&str> =
        crds::condition::reason::ALL.iter().copied().chain(codes).chain(["OOMKilled", "Killed"]).collect();
    let mut checked = 0;
    for page in runbooks() {
        let content = read(&page);
        for target in content.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            assert!(page.with_file_name(target).exists(), "{} links to {target}", page.display());
        }
        for row in content.lines().filter_map(|line| line.strip_prefix("| `")) {
            let first = row.split(" |").next().unwrap_or_default();
            let words = first.split(['`', ',', ' ']).filter(|word| word.starts_with(char::is_uppercase));
            for word in words {
                assert!(reasons.contains(word), "{}: no status has the reason {word}", page.display());
                checked += 1;
            }
        }
    }
    assert!(checked > 10, "only {checked} reasons were found");
}

#[test]
fn promtool_accepts_the_rules_and_their_tests_pass() {
    let folder = chart();
    for arguments in [["check", "rules", "alerts/alerts.yaml"], ["check", "config", "prometheus.yml"]] {
        run(built("promtool").args(arguments).current_dir(&folder))
            .unwrap_or_else(|said| panic!("{arguments:?}: {said}"));
    }
    let tests = repository().join("tests/prometheus/alerts_test.yaml");
    run(built("promtool").args(["test", "rules"]).arg(&tests)).unwrap_or_else(|said| panic!("{said}"));

    let groups = parse(&read(&tests))["tests"].as_array().expect("tests").clone();
    let cases: Vec<&Value> =
        groups.iter().flat_map(|group| group["alert_rule_test"].as_array().expect("cases of alerts")).collect();
    for alert in alerts() {
        for (fires, what) in [(true, "fires"), (false, "does not fire")] {
            let found = cases.iter().any(|case| {
                let alerts = case["exp_alerts"].as_array().expect("exp_alerts is always written");
                case["alertname"] == alert["alert"] && alerts.is_empty() != fires
            });
            assert!(found, "{}: no case of alerts_test.yaml in which it {what}", alert["alert"]);
        }
    }
}

#[test]
fn the_prometheus_rule_is_the_file() {
    let rule = |arguments: &[&str]| {
        let objects = render(&[&["--set", "metrics.prometheusRule.enabled=true"], arguments].concat());
        the(&objects, "PrometheusRule", "finetune-operator")["spec"].clone()
    };
    assert_eq!(rule(&[]), rules());
    let elsewhere = rule(&["--set", "metrics.prometheusRule.runbookBaseUrl=https://wiki.example.com/runbooks/"]);
    let expected = rules().to_string().replace(RUNBOOKS, "https://wiki.example.com/runbooks/");
    assert_eq!(objects(&elsewhere.to_string()), objects(&expected));
}
