//! Schemas of what a profile says of pods in words of its own: labels, annotations, environment variables.

use k8s_openapi::api::core::v1::EnvVarSource;
use schemars::{Schema, SchemaGenerator, json_schema};

/// The trainer's TLS library reads it.
pub const CERTIFICATES: &str = "SSL_CERT_FILE";
/// What keys of labels and annotations are, told to people.
pub(super) const KEYS: &str = "a key is a name, or a domain, a slash and a name, and none of the operator's own";
/// What is written of a key or name that is refused.
pub(super) const RESERVED: &str = "one that is not the operator's own or reserved for Kubernetes";

// Go's regular expressions, by which Helm reads the same schemas, cannot look ahead: what is reserved is a pattern of its own.
const KEY: &str = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$";
const LABEL_VALUE: &str = r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$";
const OWN_LABELS: &str = r"^(finetune\.dev/|batch\.kubernetes\.io/|kueue\.x-k8s\.io/|app\.kubernetes\.io/(name|component|managed-by)$|job-name$|controller-uid$)";
const OWN_ANNOTATIONS: &str =
    r"^(finetune\.dev/|batch\.kubernetes\.io/|kueue\.x-k8s\.io/podset-|kubectl\.kubernetes\.io/default-container$)";
/// Domains of Kubernetes, where a label of a tenant's could be taken for a word of the cluster's.
const NOT_INHERITED: &str = r"^(([^/]*\.)?(kubernetes\.io|k8s\.io|x-k8s\.io|finetune\.dev)/|job-name$|controller-uid$)";
const VARIABLE: &str = r"^[-._a-zA-Z][-._a-zA-Z0-9]*$";
/// Set by the operator, or in the way of what it sets.
const OWN_VARIABLES: &str = r"^(POD_UID|HF_HOME|HF_ENDPOINT|HF_HUB_CACHE|HUGGINGFACE_HUB_CACHE|GOMP_SPINCOUNT)$";

/// What Kubernetes knows as policies of pulling an image.
pub(super) fn pull_policy(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"enum": ["Always", "IfNotPresent", "Never", null]})
}

pub(super) fn labels(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "propertyNames": {"pattern": KEY, "not": {"pattern": OWN_LABELS}},
        "additionalProperties": {"type": "string", "pattern": LABEL_VALUE},
    })
}

pub(super) fn annotations(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "propertyNames": {"pattern": KEY, "not": {"pattern": OWN_ANNOTATIONS}},
        "additionalProperties": {"type": "string"},
    })
}

pub(super) fn inherited(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "array", "items": {"type": "string", "pattern": KEY, "not": {"pattern": NOT_INHERITED}}})
}

pub(super) fn environment(generator: &mut SchemaGenerator) -> Schema {
    let source = generator.subschema_for::<EnvVarSource>();
    let variable = json_schema!({
        "type": "object",
        "additionalProperties": false,
        "required": ["name"],
        "properties": {
            "name": {"type": "string", "pattern": VARIABLE, "not": {"pattern": OWN_VARIABLES}},
            "value": {"type": "string"},
            "valueFrom": source,
        },
    });
    json_schema!({"type": "array", "items": variable})
}
