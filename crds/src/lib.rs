//! The two contracts of the project, as types.
//!
//! User and operator meet in the [`FineTuneJob`] resource; operator and trainer meet in [`run::RunConfig`] (in),
//! [`report::Progress`] (live), [`report::Report`] and [`exit::ExitCode`] (last word). [`check`] turns YAML into a
//! resource by the rules of the CRD itself, [`resolve`] turns a resource into a run, [`condition`] has the words of its
//! status, [`status`] reads them, [`labels`] names what is made for it.
//! This crate knows no HTTP client, no async runtime and no tensor.

#![forbid(unsafe_code)]

pub mod check;
pub mod condition;
pub mod exit;
pub mod finetunejob;
pub mod labels;
pub mod profile;
pub mod quantity;
#[cfg(test)]
mod reference;
pub mod report;
pub mod resolve;
pub mod run;
pub mod status;
mod yaml;

pub use finetunejob::{FineTuneJob, FineTuneJobSpec, FineTuneJobStatus};

#[cfg(test)]
mod tests {
    use kube::CustomResourceExt;

    /// The committed CRD is the one that the types generate. `UPDATE=1` writes it.
    #[test]
    fn crd_yaml_is_current() {
        let path = "finetunejobs.yaml";
        let value = serde_json::to_value(crate::FineTuneJob::crd()).expect("the CRD is JSON");
        let generated = serde_saphyr::to_string(&value).expect("the CRD is YAML");
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(path, &generated).expect("the crate's folder is writable");
        }
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            committed == generated,
            "crds/finetunejobs.yaml is not what the types say; run `UPDATE=1 cargo test --release -p finetune-crds crd_yaml_is_current`"
        );
    }

    /// The API server refuses a CRD whose rules could cost too much: every rule must look at bounded data.
    #[test]
    fn no_rule_looks_at_unbounded_data() {
        fn walk(schema: &serde_json::Value, path: &str, warnings: &mut Vec<String>) {
            use kube::core::cel::{ScopeContext, WarningKind, analyze_rule, compile_schema};
            if let Some(rules) = schema["x-kubernetes-validations"].as_array() {
                let compiled = compile_schema(schema);
                for rule in rules.iter().filter_map(|rule| rule["rule"].as_str()) {
                    let found = analyze_rule(rule, &compiled, ScopeContext::CrdValidation);
                    // The analysis takes the variable of a macro (`exists(k, …)`) for one that is not in scope.
                    let found = found.iter().filter(|warning| warning.kind != WarningKind::WrongScope);
                    warnings.extend(found.map(|warning| format!("{path}: {rule}: {warning:?}")));
                }
            }
            for (name, below) in schema["properties"].as_object().into_iter().flatten() {
                walk(below, &format!("{path}.{name}"), warnings);
            }
            for (name, mark) in [("items", "[]"), ("additionalProperties", "{}")] {
                if schema[name].is_object() {
                    walk(&schema[name], &format!("{path}{mark}"), warnings);
                }
            }
        }
        let crd = serde_json::to_value(crate::FineTuneJob::crd()).expect("the CRD is JSON");
        let mut warnings = Vec::new();
        walk(&crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"], "", &mut warnings);
        assert!(warnings.is_empty(), "{warnings:#?}");
    }

    /// Rules compare whole subtrees of the spec, so nothing in it may be unbounded, whatever a rule names.
    #[test]
    fn every_string_list_and_map_of_the_spec_is_bounded() {
        fn walk(schema: &serde_json::Value, path: &str, unbounded: &mut Vec<String>) {
            let mut ask = |bound: &str| {
                if !schema[bound].is_i64() {
                    unbounded.push(format!("{path} has no {bound}"));
                }
            };
            if schema["x-kubernetes-int-or-string"] == true || schema["type"] == "string" && schema["enum"].is_null() {
                ask("maxLength");
            }
            if schema["type"] == "array" {
                ask("maxItems");
            }
            // A map, or an object of any fields.
            if !schema["additionalProperties"].is_null() || schema["type"] == "object" && schema["properties"].is_null()
            {
                ask("maxProperties");
            }
            if schema["x-kubernetes-preserve-unknown-fields"] == true {
                unbounded.push(format!("{path} takes unknown fields"));
            }
            for (name, below) in schema["properties"].as_object().into_iter().flatten() {
                walk(below, &format!("{path}.{name}"), unbounded);
            }
            for (name, mark) in [("items", "[]"), ("additionalProperties", "{}")] {
                if schema[name].is_object() {
                    walk(&schema[name], &format!("{path}{mark}"), unbounded);
                }
            }
        }
        let crd = serde_json::to_value(crate::FineTuneJob::crd()).expect("the CRD is JSON");
        let spec = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
        let mut unbounded = Vec::new();
        walk(spec, "spec", &mut unbounded);
        assert!(unbounded.is_empty(), "{unbounded:#?}");
    }
}
