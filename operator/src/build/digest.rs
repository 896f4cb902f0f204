//! What makes a pod the trainer that was asked for: a digest over that which decides what runs and what it may write. What admission
//! adds to a pod is not part of it: sidecars that keep away from our volumes, resources, tolerations, variables.

use std::collections::BTreeMap;

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Container, PodSpec, Volume};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::CONTAINER;
use crate::validate::digest_text;

/// Where Kubernetes mounts tokens; nothing of ours is there.
const SERVICE_ACCOUNT_FOLDER: &str = "/var/run/secrets/";

/// [`pod_digest`] of what a Job makes.
pub fn job_digest(job: &Job) -> Option<String> {
    job.spec.as_ref()?.template.spec.as_ref().map(pod_digest)
}

/// `sha256:…`, the same for the pod of a Job and for its template. An image that is named by its digest is known by that: mirrors
/// may give it another name.
pub fn pod_digest(spec: &PodSpec) -> String {
    let trainer = spec.containers.iter().find(|container| container.name == CONTAINER);
    let volumes: BTreeMap<&str, Value> =
        spec.volumes.iter().flatten().map(|volume| (volume.name.as_str(), source(volume))).collect();
    let mounts = trainer.map(|trainer| mounts(trainer, &volumes)).unwrap_or_default();
    let ours: Vec<&str> = mounts.iter().filter_map(|mount| mount["volume"].as_str()).collect();
    let others = spec.containers.iter().filter(|container| container.name != CONTAINER);
    let others = others.chain(spec.init_containers.iter().flatten());
    // Whoever else writes where the trainer does may say anything in its name.
    let guests: Vec<&str> = others
        .filter(|other| other.volume_mounts.iter().flatten().any(|mount| ours.contains(&mount.name.as_str())))
        .map(|other| other.name.as_str())
        .collect();
    let loader: BTreeMap<&str, Option<&str>> = trainer
        .and_then(|trainer| trainer.env.as_ref())
        .into_iter()
        .flatten()
        .filter(|variable| variable.name.starts_with("LD_"))
        .map(|variable| (variable.name.as_str(), variable.value.as_deref()))
        .collect();
    let shares = [spec.host_pid, spec.host_ipc, spec.share_process_namespace].map(|shared| shared.unwrap_or(false));
    let value = json!({
        "image": trainer.and_then(|trainer| trainer.image.as_deref()).map(|image| image.rsplit('@').next()),
        "command": trainer.and_then(|trainer| trainer.command.as_ref()).filter(|command| !command.is_empty()),
        "args": trainer.and_then(|trainer| trainer.args.as_ref()),
        "terminationMessagePath": trainer.and_then(|trainer| trainer.termination_message_path.as_ref()),
        "loader": loader,
        "mounts": mounts,
        "guests": guests,
        "shares": shares,
    });
    digest_text(&Sha256::digest(value.to_string()))
}

fn mounts(trainer: &Container, volumes: &BTreeMap<&str, Value>) -> Vec<Value> {
    let mut mounts: Vec<Value> = trainer
        .volume_mounts
        .iter()
        .flatten()
        .filter(|mount| !mount.mount_path.starts_with(SERVICE_ACCOUNT_FOLDER))
        .map(|mount| {
            json!({
                "path": mount.mount_path, "subPath": mount.sub_path, "readOnly": mount.read_only.unwrap_or(false),
                "volume": mount.name, "source": volumes.get(mount.name.as_str()),
            })
        })
        .collect();
    mounts.sort_by_key(|mount| mount["path"].as_str().map(str::to_owned));
    mounts
}

/// Of a volume, whose content it is.
fn source(volume: &Volume) -> Value {
    let sources = volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten());
    let maps: Vec<Value> = sources
        .map(|source| match &source.config_map {
            Some(map) => {
                let keys: Vec<&str> = map.items.iter().flatten().map(|item| item.key.as_str()).collect();
                json!({"configMap": map.name, "keys": keys})
            }
            None => json!("another source"),
        })
        .collect();
    let claim = volume.persistent_volume_claim.as_ref();
    json!({
        "claim": claim.map(|claim| (&claim.claim_name, claim.read_only.unwrap_or(false))),
        "maps": maps,
        "configMap": volume.config_map.as_ref().map(|map| &map.name),
        "secret": volume.secret.as_ref().and_then(|secret| secret.secret_name.as_ref()),
        "hostPath": volume.host_path.as_ref().map(|host| &host.path),
        "scratch": volume.empty_dir.is_some(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::from_value;

    use super::*;

    fn template() -> Value {
        json!({
            "containers": [{
                "name": "trainer", "image": "registry.example/trainer@sha256:1", "args": ["run"],
                "volumeMounts": [{"name": "data", "mountPath": "/data"}, {"name": "config", "mountPath": "/etc/finetune"}],
            }],
            "volumes": [
                {"name": "data", "persistentVolumeClaim": {"claimName": "bot-0b8e1c9e"}},
                {"name": "config", "projected": {"sources": [{"configMap": {"name": "bot-run", "items": [{"key": "run.yaml", "path": "run.yaml"}]}}]}},
            ],
        })
    }

    fn digest(change: impl FnOnce(&mut Value)) -> String {
        let mut spec = template();
        change(&mut spec);
        pod_digest(&from_value(spec).expect("a pod"))
    }

    fn push(spec: &mut Value, pointer: &str, value: Value) {
        spec.pointer_mut(pointer).and_then(Value::as_array_mut).expect("a list").push(value);
    }

    #[test]
    fn what_admission_adds_is_the_same_trainer() {
        let expected = digest(|_| {});
        for (what, found) in [
            ("a sidecar", digest(|spec| push(spec, "/containers", json!({"name": "istio-proxy", "image": "istio"})))),
            (
                "an init container",
                digest(|spec| spec["initContainers"] = json!([{"name": "istio-init", "image": "istio"}])),
            ),
            ("a mirror", digest(|spec| spec["containers"][0]["image"] = json!("mirror.local/x/trainer@sha256:1"))),
            ("variables", digest(|spec| spec["containers"][0]["env"] = json!([{"name": "AWS_REGION", "value": "eu"}]))),
            ("resources", digest(|spec| spec["containers"][0]["resources"] = json!({"limits": {"cpu": "1"}}))),
            ("a node", digest(|spec| spec["nodeName"] = json!("node1"))),
            (
                "a token",
                digest(|spec| {
                    push(spec, "/volumes", json!({"name": "kube-api-access", "projected": {"sources": []}}));
                    let mount = json!({"name": "kube-api-access", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"});
                    push(spec, "/containers/0/volumeMounts", mount);
                }),
            ),
            ("defaults", digest(|spec| spec["volumes"][1]["projected"]["defaultMode"] = json!(420))),
        ] {
            assert_eq!(found, expected, "{what}");
        }
    }

    #[test]
    fn what_could_speak_for_the_trainer_is_another() {
        let expected = digest(|_| {});
        for (what, found) in [
            ("an image", digest(|spec| spec["containers"][0]["image"] = json!("evil.example/trainer@sha256:2"))),
            ("a tag", digest(|spec| spec["containers"][0]["image"] = json!("registry.example/trainer:1"))),
            ("a command", digest(|spec| spec["containers"][0]["command"] = json!(["sh"]))),
            ("arguments", digest(|spec| spec["containers"][0]["args"] = json!(["run", "--attempt", "2"]))),
            (
                "a preloaded library",
                digest(|spec| spec["containers"][0]["env"] = json!([{"name": "LD_PRELOAD", "value": "/x"}])),
            ),
            ("a claim", digest(|spec| spec["volumes"][0]["persistentVolumeClaim"]["claimName"] = json!("mine"))),
            (
                "a configuration",
                digest(|spec| spec["volumes"][1]["projected"]["sources"][0]["configMap"]["name"] = json!("mine")),
            ),
            (
                "a termination message of its own",
                digest(|spec| spec["containers"][0]["terminationMessagePath"] = json!("/data/word")),
            ),
            ("the processes of others", digest(|spec| spec["shareProcessNamespace"] = json!(true))),
            (
                "a guest on the volume",
                digest(|spec| {
                    let mounts = json!([{"name": "data", "mountPath": "/data"}]);
                    push(spec, "/containers", json!({"name": "guest", "image": "busybox", "volumeMounts": mounts}));
                }),
            ),
            ("no trainer", digest(|spec| spec["containers"][0]["name"] = json!("other"))),
        ] {
            assert_ne!(found, expected, "{what}");
        }
    }
}
