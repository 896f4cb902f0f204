//! Where the pods of a job may go.

use std::collections::BTreeMap;

use crds::run::PodStage;
use k8s_openapi::api::core::v1::{
    Affinity, NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, PodSpec, Toleration,
};

use crate::validate::PodPlan;

/// The label that a kubelet gives its node, and that volumes of one node are bound by.
pub const HOSTNAME_LABEL: &str = "kubernetes.io/hostname";
/// The label of a node's zone, which volumes of a zone are bound by.
pub const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// Where the first pod of a job must go, because the volume is made where it goes: where the training pod can follow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// A node label and its values, one of which the node has; `None`: any node.
    pub among: Option<(String, Vec<String>)>,
}

impl Placement {
    fn affinity(&self) -> Option<Affinity> {
        let (key, values) = self.among.clone()?;
        let required = NodeSelectorRequirement { key, operator: "In".into(), values: Some(values) };
        let term = NodeSelectorTerm { match_expressions: Some(vec![required]), match_fields: None };
        Some(Affinity {
            node_affinity: Some(NodeAffinity {
                required_during_scheduling_ignored_during_execution: Some(NodeSelector {
                    node_selector_terms: vec![term],
                }),
                ..NodeAffinity::default()
            }),
            ..Affinity::default()
        })
    }
}

/// Node labels and taints of the pods of a stage: where the profile says nothing of its own about CPU stages, theirs are those of
/// training, whose nodes may be the only ones, and all tainted.
pub fn nodes_of(pods: &PodPlan, stage: PodStage) -> (&BTreeMap<String, String>, &[Toleration]) {
    if stage == PodStage::Train {
        return (&pods.node_selector, &pods.tolerations);
    }
    (
        pods.cpu_node_selector.as_ref().unwrap_or(&pods.node_selector),
        pods.cpu_tolerations.as_ref().unwrap_or(&pods.tolerations),
    )
}

/// Sends a pod where those of its stage go.
pub(super) fn place(pod: &mut PodSpec, pods: &PodPlan, stage: PodStage, placement: &Placement) {
    let (labels, taints) = nodes_of(pods, stage);
    pod.node_selector = Some(labels.clone()).filter(|labels| !labels.is_empty());
    pod.tolerations = Some(taints.to_vec()).filter(|taints| !taints.is_empty());
    if stage == PodStage::Prepare {
        pod.affinity = placement.affinity();
    }
}
