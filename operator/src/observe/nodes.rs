//! Which nodes the training pod of a job could run on. Asked once, before the first pod is made: with a storage class that waits
//! for its first consumer the volume is made where that pod goes, and may be one of a zone or of a single node.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crds::FineTuneJob;
use crds::quantity::value;
use crds::resolve::VolumeClaim;
use crds::run::PodStage;
use k8s_openapi::api::core::v1::{Node, PersistentVolumeClaim, ResourceRequirements, Taint, Toleration};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};

use crate::build::{HOSTNAME_LABEL, Placement, ZONE_LABEL, nodes_of};
use crate::call;
use crate::validate::{Plan, PodPlan};

/// More nodes than these are not named in a pod.
const MAX_NODES: usize = 100;
/// A list is as good as new for so long: jobs that come together look at one.
const FRESH: Duration = Duration::from_secs(30);
/// Nodes that are listed at once.
const PAGE: u32 = 500;
/// Labels of which a node has its value by what it is, and the next node of its kind the same.
const KIND_LABELS: [&str; 8] = [
    "node.kubernetes.io/instance-type",
    "karpenter.sh/nodepool",
    "eks.amazonaws.com/nodegroup",
    "cloud.google.com/gke-nodepool",
    "kubernetes.azure.com/agentpool",
    "cloud.google.com/gke-accelerator",
    "nvidia.com/gpu.product",
    "amd.com/gpu.product-name",
];
/// The annotation of the class that a claim without one gets.
const DEFAULT_CLASS_ANNOTATION: &str = "storageclass.kubernetes.io/is-default-class";

/// What decides whether a pod can go to a node.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeSeen {
    labels: BTreeMap<String, String>,
    /// Those that keep pods away.
    taints: Vec<Taint>,
    allocatable: BTreeMap<String, f64>,
}

/// The nodes of the cluster, as they were listed last.
#[derive(Debug, Default)]
pub struct Nodes {
    /// `None` in it: the operator may not list nodes.
    listed: tokio::sync::Mutex<Option<(Instant, Option<Arc<Vec<NodeSeen>>>)>>,
}

impl Nodes {
    /// All nodes; `None` where they may not be listed.
    async fn list(&self, client: &Client) -> Result<Option<Arc<Vec<NodeSeen>>>, call::Error> {
        let mut listed = self.listed.lock().await;
        if let Some((when, nodes)) = &*listed
            && when.elapsed() < FRESH
        {
            return Ok(nodes.clone());
        }
        let nodes = match list(client).await {
            Ok(nodes) => Some(Arc::new(nodes)),
            Err(kube::Error::Api(status)) if status.code == 403 => {
                tracing::warn!(
                    "nodes cannot be listed ({}): the first pod of a job goes where its profile says, and a volume that is made \
                     where it goes may be out of reach of the training pod; name its nodes or their zone in the profile's nodeSelector",
                    status.message
                );
                None
            }
            Err(source) => return Err(call::Error::many("list", "Nodes", source)),
        };
        *listed = Some((Instant::now(), nodes.clone()));
        Ok(nodes)
    }
}

/// Where the pod that prepares a job must go, so that the volume is made in reach of the training pod. Nothing is asked of it where
/// the volume is there already or comes before any pod, and where nothing is known: no right to list nodes, or no node yet that could train.
pub async fn placement(
    client: &Client,
    nodes: &Nodes,
    job: &FineTuneJob,
    plan: &Plan,
) -> Result<Placement, call::Error> {
    let name = plan.claim.name();
    let namespace = job.namespace().unwrap_or_default();
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), &namespace);
    let claim = claims.get_opt(name).await;
    let claim = claim.map_err(|source| call::Error::one::<PersistentVolumeClaim>("get", &namespace, name, source))?;
    if claim.is_some_and(|claim| has_a_volume(&claim)) || is_bound_at_once(client, &plan.claim).await? {
        return Ok(Placement::default());
    }
    Ok(nodes.list(client).await?.map_or_else(Placement::default, |nodes| place(&nodes, &plan.pods)))
}

/// Whether the class of a claim that is to be made gives it a volume before any pod comes. Where classes may not be read, it may be
/// one that waits.
async fn is_bound_at_once(client: &Client, claim: &VolumeClaim) -> Result<bool, call::Error> {
    let VolumeClaim::New { storage_class_name, .. } = claim else { return Ok(false) };
    let classes: Api<StorageClass> = Api::all(client.clone());
    let classes = match classes.list(&ListParams::default()).await {
        Ok(classes) => classes.items,
        Err(kube::Error::Api(status)) if status.is_forbidden() => return Ok(false),
        Err(source) => return Err(call::Error::many("list", "StorageClasses", source)),
    };
    let is_it = |class: &&StorageClass| match storage_class_name {
        Some(name) => class.name_any() == *name,
        None => class.annotations().get(DEFAULT_CLASS_ANNOTATION).is_some_and(|value| value == "true"),
    };
    let mode = classes.iter().find(is_it).map(|class| class.volume_binding_mode.as_deref().unwrap_or("Immediate"));
    Ok(mode == Some("Immediate"))
}

async fn list(client: &Client) -> Result<Vec<NodeSeen>, kube::Error> {
    let api: Api<Node> = Api::all(client.clone());
    let mut parameters = ListParams::default().limit(PAGE);
    let mut nodes = Vec::new();
    loop {
        let page = api.list(&parameters).await?;
        nodes.extend(page.items.into_iter().filter_map(seen));
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => parameters = parameters.continue_token(&token),
            None => return Ok(nodes),
        }
    }
}

/// A volume that is chosen is where it is.
fn has_a_volume(claim: &PersistentVolumeClaim) -> bool {
    claim.spec.as_ref().and_then(|spec| spec.volume_name.as_ref()).is_some_and(|name| !name.is_empty())
}

/// What matters of a node; `None` of one that takes no pods now.
fn seen(node: Node) -> Option<NodeSeen> {
    let (spec, status) = (node.spec.unwrap_or_default(), node.status.unwrap_or_default());
    if spec.unschedulable == Some(true) {
        return None;
    }
    let taints = spec.taints.unwrap_or_default();
    let allocatable = status.allocatable.unwrap_or_default();
    Some(NodeSeen {
        labels: node.metadata.labels.unwrap_or_default(),
        taints: taints.into_iter().filter(|taint| taint.effect != "PreferNoSchedule").collect(),
        allocatable: allocatable.into_iter().filter_map(|(name, most)| Some((name, value(&most.0)?))).collect(),
    })
}

/// Where the first pod must go: to nodes that take it and the training pod. They are told from others by the label of their kind,
/// which nodes have too that are yet to come; by their names where no such label tells them apart; and by zone where they are many,
/// or where the first pod has nodes of its own.
pub fn place(nodes: &[NodeSeen], pods: &PodPlan) -> Placement {
    let candidates = candidates(nodes, pods);
    let (labels, taints) = nodes_of(pods, PodStage::Prepare);
    let takes_the_first = |node: &&NodeSeen| node.takes(labels, taints, &pods.cpu_resources);
    let both: Vec<&NodeSeen> = candidates.iter().copied().filter(takes_the_first).collect();
    if both.is_empty() {
        return among(ZONE_LABEL, values(&candidates, ZONE_LABEL));
    }
    let is_candidate = |node: &NodeSeen| candidates.iter().any(|candidate| std::ptr::eq(*candidate, node));
    let others: Vec<&NodeSeen> = nodes.iter().filter(|node| takes_the_first(node) && !is_candidate(node)).collect();
    for label in KIND_LABELS {
        let (kinds, of_others) = (values(&both, label), values(&others, label));
        if both.iter().all(|node| node.labels.contains_key(label)) && kinds.iter().all(|kind| !of_others.contains(kind))
        {
            return among(label, kinds);
        }
    }
    if both.len() <= MAX_NODES && both.iter().all(|node| node.labels.contains_key(HOSTNAME_LABEL)) {
        return among(HOSTNAME_LABEL, values(&both, HOSTNAME_LABEL));
    }
    among(ZONE_LABEL, values(&both, ZONE_LABEL))
}

fn among(label: &str, values: Vec<String>) -> Placement {
    Placement { among: (!values.is_empty()).then(|| (label.to_owned(), values)) }
}

/// Nodes that could run the training pod when they are idle.
pub fn candidates<'a>(nodes: &'a [NodeSeen], pods: &PodPlan) -> Vec<&'a NodeSeen> {
    let (labels, taints) = nodes_of(pods, PodStage::Train);
    nodes.iter().filter(|node| node.takes(labels, taints, &pods.resources)).collect()
}

/// The values of a label, each once.
fn values(nodes: &[&NodeSeen], label: &str) -> Vec<String> {
    let all: BTreeSet<&String> = nodes.iter().filter_map(|node| node.labels.get(label)).collect();
    all.into_iter().cloned().collect()
}

impl NodeSeen {
    fn takes(
        &self,
        labels: &BTreeMap<String, String>,
        tolerations: &[Toleration],
        resources: &ResourceRequirements,
    ) -> bool {
        labels.iter().all(|(key, value)| self.labels.get(key) == Some(value))
            && self.taints.iter().all(|taint| tolerations.iter().any(|toleration| tolerates(toleration, taint)))
            && self.has_room(resources)
    }

    /// Whether it has as much as is asked for, were nothing else on it. A limit without a request is a request.
    fn has_room(&self, resources: &ResourceRequirements) -> bool {
        let mut asked = resources.limits.clone().unwrap_or_default();
        asked.extend(resources.requests.clone().unwrap_or_default());
        asked.iter().all(|(name, quantity)| {
            let wanted = value(&quantity.0).unwrap_or_default();
            wanted <= self.allocatable.get(name).copied().unwrap_or_default()
        })
    }
}

/// As the scheduler has it.
fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let is_empty = |text: &Option<String>| text.as_deref().unwrap_or_default().is_empty();
    let value = |text: &Option<String>| text.clone().unwrap_or_default();
    (is_empty(&toleration.effect) || toleration.effect.as_deref() == Some(taint.effect.as_str()))
        && (is_empty(&toleration.key) || toleration.key.as_deref() == Some(taint.key.as_str()))
        && match toleration.operator.as_deref().unwrap_or_default() {
            "Exists" => true,
            "" | "Equal" => value(&toleration.value) == value(&taint.value),
            _ => false,
        }
}

#[cfg(test)]
mod tests;
