//! Dashboards: house rules that Grafana's types do not know, those types, and every query.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

use harness::repository;
use serde_json::{Value, json};

use super::{chart, made_by, parse, read, render, run, series, text, the};

/// Their files, and their names for Grafana.
pub const DASHBOARDS: [(&str, &str); 2] = [("fleet", "finetune-fleet"), ("run", "finetune-run")];

fn path(name: &str) -> PathBuf {
    chart().join(format!("dashboards/{name}.json"))
}

pub fn dashboard(name: &str) -> Value {
    parse(&read(&path(name)))
}

fn panels(dashboard: &Value) -> &Vec<Value> {
    dashboard["panels"].as_array().expect("panels")
}

/// The title of the panel and the expression, of every query of a dashboard.
pub fn queries(dashboard: &Value) -> impl Iterator<Item = (&str, &str)> {
    let with_queries = panels(dashboard).iter().filter_map(|panel| Some((panel, panel["targets"].as_array()?)));
    with_queries
        .flat_map(|(panel, targets)| targets.iter().map(|target| (text(&panel["title"]), text(&target["expr"]))))
}

/// The series that a variable of a dashboard takes its values from: of `label_values(SERIES, LABEL)`.
pub fn series_of_variable(variable: &Value) -> &str {
    let query = variable["query"]["query"].as_str().unwrap_or_default();
    query.strip_prefix("label_values(").and_then(|rest| rest.rsplit_once(", ")).unwrap_or_default().0
}

/// What breaks the house rules.
fn lint(dashboard: &Value) -> Vec<String> {
    let mut problems = Vec::new();
    let mut ask = |holds: bool, problem: &str| {
        if !holds {
            problems.push(problem.to_owned());
        }
    };
    ask(dashboard["id"].is_null() && dashboard.get("id").is_some(), "id is not null");
    ask(dashboard["uid"].as_str().is_some_and(|uid| uid.len() <= 40), "no uid, or a long one");
    ask((39..=41).contains(&dashboard["schemaVersion"].as_i64().unwrap_or(0)), "schemaVersion is not 39 to 41");
    let list = dashboard["templating"]["list"].as_array().cloned().unwrap_or_default();
    let variables: Vec<_> = list.iter().map(|variable| variable["name"].as_str().unwrap_or_default()).collect();
    ask(
        variables == ["datasource", "namespace", "finetunejob"],
        "the variables are not datasource, namespace, finetunejob",
    );
    let source = json!({"type": "prometheus", "uid": "${datasource}"});
    for variable in list.iter().filter(|variable| variable["type"] == "query") {
        ask(variable["datasource"] == source, "a variable does not use ${datasource}");
        series::read(series_of_variable(variable)).problems.iter().for_each(|problem| ask(false, problem));
    }
    ask(
        dashboard["links"].as_array().is_some_and(|links| {
            !links.is_empty() && links.iter().all(|link| link["includeVars"] == true && link["keepTime"] == true)
        }),
        "no link to the other dashboard that keeps variables and time",
    );

    let panels = panels(dashboard);
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_i64()).collect();
    ask(ids.len() == panels.len() && !ids.contains(&None), "panel ids are not unique");
    let place = |panel: &Value| ["x", "y", "w", "h"].map(|side| panel["gridPos"][side].as_i64().unwrap_or(-1));
    for (number, panel) in panels.iter().enumerate() {
        let title = panel["title"].as_str().unwrap_or_default();
        let mut ask = |holds: bool, problem: &str| ask(holds, &format!("{title:?}: {problem}"));
        let [x, y, w, h] = place(panel);
        ask(x >= 0 && y >= 0 && w > 0 && h > 0 && x + w <= 24, "lies outside of the grid");
        for other in &panels[number + 1..] {
            let [ox, oy, ow, oh] = place(other);
            let apart = x + w <= ox || ox + ow <= x || y + h <= oy || oy + oh <= y;
            ask(apart, &format!("overlaps {}", other["title"]));
        }
        ask(!title.is_empty(), "has no title");
        if panel["type"] == "row" {
            continue;
        }
        ask(panel["datasource"] == source, "does not use ${datasource}");
        ask(panel["fieldConfig"]["defaults"]["unit"].as_str().is_some_and(|unit| !unit.is_empty()), "has no unit");
        let targets = panel["targets"].as_array().cloned().unwrap_or_default();
        ask(!targets.is_empty(), "has no query");
        let mut named = Vec::new();
        for target in &targets {
            ask(target["datasource"] == source, "a query does not use ${datasource}");
            let query = target["expr"].as_str().unwrap_or_default();
            let read = series::read(query);
            read.problems.iter().for_each(|problem| ask(false, problem));
            for range in query.split('[').skip(1).filter_map(|rest| rest.split(']').next()) {
                ask(["$__rate_interval", "$__range"].contains(&range), &format!("a fixed range [{range}]"));
            }
            let of_a_job = read.names.iter().any(|name| !name.starts_with("finetune_operator_"));
            let chosen = query.contains("namespace=~\"$namespace\",finetunejob=~\"$finetunejob\"");
            ask(!of_a_job || chosen, "does not heed the chosen namespace and job");
            named.extend(read.names);
        }
        let last = panel["description"].as_str().and_then(|text| text.strip_suffix('`')?.rsplit('`').next());
        ask(
            last.is_some_and(|last| named.iter().any(|name| name == last)),
            "its description does not end in one of its metrics",
        );
    }
    problems
}

#[test]
fn dashboards_keep_the_house_rules() {
    for (name, uid) in DASHBOARDS {
        let dashboard = dashboard(name);
        assert_eq!(dashboard["uid"], uid, "links and bookmarks of users name it");
        assert!(panels(&dashboard).len() > 15, "{name} lost its panels");
        assert_eq!(lint(&dashboard), Vec::<String>::new(), "{name}");
    }
}

#[test]
fn broken_house_rules_are_found() {
    for (pointer, value, expected) in [
        ("/id", json!(7), "id is not null"),
        ("/schemaVersion", json!(42), "schemaVersion"),
        ("/panels/1/id", json!(1), "not unique"),
        ("/panels/1/gridPos/x", json!(1), "overlaps"),
        ("/panels/1/gridPos/w", json!(30), "outside of the grid"),
        ("/panels/1/title", json!(""), "has no title"),
        ("/panels/1/description", json!("What it is."), "does not end in one of its metrics"),
        ("/panels/1/fieldConfig/defaults/unit", json!(""), "has no unit"),
        ("/panels/1/datasource/uid", json!("abc"), "does not use ${datasource}"),
        ("/panels/1/targets/0/expr", json!("sum(rate(finetune_tokens_total[5m]))"), "a fixed range [5m]"),
        ("/panels/1/targets/0/expr", json!("max(finetune_step)"), "does not heed"),
        ("/panels/1/targets/0/expr", json!("max(finetune_stepp)"), "nobody exports"),
        ("/links/0/includeVars", json!(false), "no link"),
    ] {
        let mut dashboard = dashboard("run");
        *dashboard.pointer_mut(pointer).unwrap_or_else(|| panic!("no {pointer}")) = value;
        let problems = lint(&dashboard);
        assert!(problems.iter().any(|problem| problem.contains(expected)), "{pointer}: {problems:?}");
    }
}

/// What each dashboard must show at least.
#[test]
fn dashboards_show_what_is_promised() {
    let promised: [(&str, &[&str]); 2] = [
        (
            "run",
            &[
                "finetune_train_loss",
                "finetune_eval_loss",
                "finetune_learning_rate",
                "finetune_gradient_norm",
                "finetune_tokens_total",
                "finetune_steps_planned",
                "finetune_estimated_completion_timestamp_seconds",
                "finetune_step_phase_seconds",
                "finetune_step_duration_seconds",
                "finetune_checkpoint_last_success_timestamp_seconds",
                "finetune_checkpoint_size_bytes",
                "finetune_checkpoint_duration_seconds",
                "finetune_checkpoints_total",
                "finetune_gpu_memory_allocated_bytes",
                "finetune_gpu_utilization_ratio",
                "finetunejob_status_attempts",
                "finetunejob_status_phase",
            ],
        ),
        (
            "fleet",
            &[
                "finetunejob_status_phase",
                "finetune_tokens_total",
                "finetunejob_created_timestamp_seconds",
                "finetunejob_start_timestamp_seconds",
                "finetune_operator_reconcile_total",
                "finetune_operator_reconcile_errors_total",
                "finetune_operator_reconcile_duration_seconds",
                "finetune_operator_watch_last_success_timestamp_seconds",
                "finetune_operator_leader",
                "finetune_operator_progress_polls_total",
                "finetunejob_waiting_since_timestamp_seconds",
                "finetunejob_last_report_timestamp_seconds",
            ],
        ),
    ];
    for (name, series) in promised {
        let dashboard = dashboard(name);
        let shown: BTreeSet<String> = queries(&dashboard).flat_map(|(_, query)| series::read(query).names).collect();
        for series in series {
            assert!(shown.contains(*series), "{name} does not show {series}");
        }
    }
    // The curve over steps, not over time: x and y are columns that the joined queries make.
    let run = dashboard("run");
    let chart = panels(&run).iter().find(|panel| panel["type"] == "xychart").expect("an XY chart");
    let legends: Vec<_> =
        chart["targets"].as_array().expect("queries").iter().map(|target| text(&target["legendFormat"])).collect();
    for series in chart["options"]["series"].as_array().expect("series") {
        for axis in ["x", "y"] {
            assert!(
                legends.contains(&text(&series[axis]["matcher"]["options"])),
                "{series} names no column of {legends:?}"
            );
        }
    }
    assert_eq!(chart["transformations"][0]["id"], "joinByField");
}

#[test]
fn dashboards_fit_the_types_of_grafana() {
    let folder = made_by("tools/grafana-schema.sh");
    let check = |files: &[PathBuf]| {
        run(Command::new("node").arg(repository().join("tests/dashboards/typecheck.mjs")).arg(&folder).args(files))
    };
    check(&DASHBOARDS.map(|(name, _)| path(name))).unwrap_or_else(|said| panic!("{said}"));
    let broken = tempfile::NamedTempFile::new().expect("a temporary file");
    for (pointer, value) in [("/panels/0/gridPos/h", json!("4")), ("/panels/0/options/textMode", json!("loud"))] {
        let mut dashboard = dashboard("run");
        *dashboard.pointer_mut(pointer).unwrap_or_else(|| panic!("no {pointer}")) = value;
        std::fs::write(broken.path(), dashboard.to_string()).expect("written");
        check(&[broken.path().to_owned()]).expect_err(pointer);
    }
}

#[test]
fn config_maps_carry_the_dashboards_unchanged() {
    let objects = render(&["--set", "grafana.dashboards.folder=ML"]);
    for (name, _) in DASHBOARDS {
        let map = the(&objects, "ConfigMap", &format!("finetune-operator-dashboard-{name}"));
        assert_eq!(parse(text(&map["data"][format!("finetune-{name}.json")])), dashboard(name));
        assert_eq!(map["metadata"]["labels"]["grafana_dashboard"], "1");
        assert_eq!(map["metadata"]["annotations"]["grafana_folder"], "ML");
    }
}
