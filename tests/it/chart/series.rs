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

/// Where they are registered, under the prefix that the registry was made with.
const SOURCES: [&str; 2] = ["trainer/src/tell/serve/telemetry.rs", "operator/src/telemetry.rs"];

/// Where the operator lists the gauges of a job.
const JOB_FAMILIES: &str = "operator/src/telemetry/series.rs";

/// How a series is registered, spaces left out; the name follows.
const CALLS: [(&str, Kind); 10] = [
    ("gauge(", Kind::Gauge),
    ("gauges(", Kind::Gauge),
    ("Gauge::new(", Kind::Gauge),
    ("GaugeVec::new(Opts::new(", Kind::Gauge),
    ("counter(", Kind::Counter),
    ("counters(", Kind::Counter),
    ("CounterVec::new(Opts::new(", Kind::Counter),
    ("histogram(", Kind::Histogram),
    ("options(", Kind::Histogram),
    ("HistogramOpts::new(", Kind::Histogram),
];

/// Series of the trainer that come with its figures of accelerators; drop each from here once the trainer registers it.
const PLANNED: [(&str, Kind); 3] = [
    ("finetune_gpu_memory_allocated_bytes", Kind::Gauge),
    ("finetune_gpu_utilization_ratio", Kind::Gauge),
    ("finetune_gpu_energy_joules_total", Kind::Counter),
];

/// Every series, by the names that the sources register.
fn exported() -> &'static BTreeMap<String, Kind> {
    static SERIES: OnceLock<BTreeMap<String, Kind>> = OnceLock::new();
    SERIES.get_or_init(|| {
        let mut series: BTreeMap<_, _> = PLANNED.iter().map(|(name, kind)| ((*name).to_owned(), *kind)).collect();
        for source in SOURCES {
            let mut code = super::read(&repository().join(source));
            code.retain(|character| !character.is_whitespace());
            for part in code.split("Registry::new_custom(Some(\"").skip(1) {
                let prefix = part.split('"').next().unwrap_or_default();
                for (call, kind) in CALLS {
                    let names = part.split(call).skip(1).filter_map(|rest| rest.strip_prefix('"')?.split('"').next());
                    series.extend(names.map(|name| (format!("{prefix}_{name}"), kind)));
                }
            }
        }
        let mut code = super::read(&repository().join(JOB_FAMILIES));
        code.retain(|character| !character.is_whitespace());
        let names = code.split("Family{name:\"").skip(1).filter_map(|rest| rest.split('"').next());
        series.extend(names.map(|name| (format!("finetunejob_{name}"), Kind::Gauge)));
        for prefix in ["finetune_step", "finetune_operator_", "finetunejob_"] {
            let found = series.keys().filter(|name| name.starts_with(prefix)).count();
            assert!(found > 3, "{prefix}…: series are registered in another way now: {series:?}");
        }
        series
    })
}

/// The series that a query names, each with its labels too, and what is wrong with it.
#[derive(Debug, Default)]
pub struct Query {
    pub names: Vec<String>,
    pub selectors: Vec<String>,
    pub problems: Vec<String>,
}

/// A query as Grafana sends it for these jobs.
pub fn substituted(query: &str, namespace: &str, finetunejob: &str) -> String {
    query
        .replace("$__rate_interval", "1m")
        .replace("$__range", "1h")
        .replace("$namespace", namespace)
        .replace("$finetunejob", finetunejob)
}

/// Parses a query, variables of Grafana substituted.
pub fn read(query: &str) -> Query {
    let substituted = substituted(query, "team-a", "support-bot");
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
    read.selectors.push(selector.to_string());
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
