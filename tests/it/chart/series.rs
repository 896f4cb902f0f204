//! The series that trainer and operator export, and what a query may do with them.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use harness::repository;
use promql_parser::parser::{self, Expr, VectorSelector};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Gauge,
    Counter,
    Histogram,
}

/// What the operator exports, by the contract between the parts.
// Once operator/src/telemetry.rs registers these, read them from there, as `exported` does for the trainer.
const OPERATOR: [(&str, Kind); 15] = [
    ("finetune_operator_reconcile_total", Kind::Counter),
    ("finetune_operator_reconcile_duration_seconds", Kind::Histogram),
    ("finetune_operator_reconcile_errors_total", Kind::Counter),
    ("finetune_operator_leader", Kind::Gauge),
    ("finetune_operator_build_info", Kind::Gauge),
    ("finetune_operator_watch_last_success_timestamp_seconds", Kind::Gauge),
    ("finetunejob_info", Kind::Gauge),
    ("finetunejob_status_phase", Kind::Gauge),
    ("finetunejob_status_condition", Kind::Gauge),
    ("finetunejob_status_progress_ratio", Kind::Gauge),
    ("finetunejob_status_train_loss", Kind::Gauge),
    ("finetunejob_status_attempts", Kind::Gauge),
    ("finetunejob_created_timestamp_seconds", Kind::Gauge),
    ("finetunejob_start_timestamp_seconds", Kind::Gauge),
    ("finetunejob_completion_timestamp_seconds", Kind::Gauge),
];

/// Series of the trainer that come with its figures of accelerators; drop each from here once the trainer registers it.
const PLANNED: [(&str, Kind); 3] = [
    ("finetune_gpu_memory_allocated_bytes", Kind::Gauge),
    ("finetune_gpu_utilization_ratio", Kind::Gauge),
    ("finetune_gpu_energy_joules_total", Kind::Counter),
];

/// Every series: the trainer's by the names that its sources register.
fn exported() -> &'static BTreeMap<String, Kind> {
    static SERIES: OnceLock<BTreeMap<String, Kind>> = OnceLock::new();
    SERIES.get_or_init(|| {
        let source = std::fs::read_to_string(repository().join("trainer/src/serve.rs")).expect("the trainer's series");
        let mut series = BTreeMap::new();
        for (call, kind) in [
            ("gauge(", Kind::Gauge),
            ("gauges(", Kind::Gauge),
            ("counter(", Kind::Counter),
            ("counters(", Kind::Counter),
            ("histogram(", Kind::Histogram),
            ("options(", Kind::Histogram),
        ] {
            let calls = source.split(call).skip(1).filter_map(|rest| rest.trim_start().strip_prefix('"'));
            series
                .extend(calls.filter_map(|rest| rest.split('"').next()).map(|name| (format!("finetune_{name}"), kind)));
        }
        assert!(series.len() > 15, "the trainer registers its series in another way now: {series:?}");
        series.extend(OPERATOR.iter().chain(&PLANNED).map(|(name, kind)| ((*name).to_owned(), *kind)));
        series
    })
}

/// The series that a query names, and what is wrong with it.
#[derive(Debug, Default)]
pub struct Query {
    pub names: Vec<String>,
    pub problems: Vec<String>,
}

/// Parses a query, variables of Grafana substituted.
pub fn read(query: &str) -> Query {
    let substituted = query
        .replace("$__rate_interval", "1m")
        .replace("$__range", "1h")
        .replace("$namespace", "team-a")
        .replace("$finetunejob", "support-bot");
    let mut read = Query::default();
    if substituted.contains('$') {
        read.problems.push(format!("a variable is not substituted: {substituted}"));
    }
    match parser::parse(&substituted) {
        Ok(expression) => walk(&expression, false, &mut read),
        Err(error) => read.problems.push(error),
    }
    read
}

fn walk(expression: &Expr, inside_rate: bool, read: &mut Query) {
    match expression {
        Expr::Aggregate(aggregate) => walk(&aggregate.expr, false, read),
        Expr::Unary(unary) => walk(&unary.expr, false, read),
        Expr::Binary(binary) => {
            walk(&binary.lhs, false, read);
            walk(&binary.rhs, false, read);
        }
        Expr::Paren(paren) => walk(&paren.expr, inside_rate, read),
        Expr::Subquery(subquery) => walk(&subquery.expr, inside_rate, read),
        Expr::NumberLiteral(_) | Expr::StringLiteral(_) | Expr::Extension(_) => {}
        Expr::VectorSelector(selector) => select(selector, inside_rate, read),
        Expr::MatrixSelector(matrix) => select(&matrix.vs, inside_rate, read),
        Expr::Call(call) => {
            let rate = ["rate", "increase"].contains(&call.func.name);
            call.args.args.iter().for_each(|argument| walk(argument, rate, read));
        }
    }
}

fn select(selector: &VectorSelector, inside_rate: bool, read: &mut Query) {
    let Some(name) = &selector.name else {
        read.problems.push(format!("a selector without a name: {selector}"));
        return;
    };
    let of_histogram = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
    let (series, kind) = match of_histogram.filter(|series| exported().get(*series) == Some(&Kind::Histogram)) {
        Some(series) => (series, Some(Kind::Counter)),
        None => (name.as_str(), exported().get(name).copied()),
    };
    read.names.push(series.to_owned());
    match (kind, inside_rate) {
        (None, _) => read.problems.push(format!("nobody exports {name}")),
        (Some(Kind::Histogram), _) => {
            read.problems.push(format!("{name} is a histogram: name its _bucket, _sum or _count"));
        }
        (Some(Kind::Counter), false) => {
            read.problems.push(format!("the counter {name} is outside of rate and increase"));
        }
        (Some(Kind::Gauge), true) => read.problems.push(format!("the gauge {name} is inside of rate or increase")),
        (Some(Kind::Counter), true) | (Some(Kind::Gauge), false) => {}
    }
}

#[test]
fn wrong_queries_are_found() {
    for (query, expected) in [
        ("sum(rate(finetune_tokens_total[5m])", "parenthes"),
        ("finetune_tokens_total", "outside of rate"),
        ("rate(finetune_step[5m])", "inside of rate"),
        ("max(finetune_step_duration_seconds)", "is a histogram"),
        ("max(finetune_step_duration_seconds_total)", "nobody exports"),
        ("max(finetune_model_flops_utilization_ratio)", "nobody exports"),
        ("max({job=\"x\"})", "without a name"),
        ("max(finetune_step{pod=\"$pod\"})", "not substituted"),
    ] {
        let problems = read(query).problems.join("; ");
        assert!(problems.contains(expected), "{query}: {problems}");
    }
    let fine =
        read("histogram_quantile(0.9, sum by (le) (rate(finetune_step_duration_seconds_bucket[$__rate_interval])))");
    assert_eq!((fine.names, fine.problems), (vec!["finetune_step_duration_seconds".to_owned()], Vec::new()));
}
