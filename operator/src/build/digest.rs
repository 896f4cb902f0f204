//! What makes a pod the trainer that was asked for: a digest over that which decides what runs and what it may write. What admission
//! adds to a pod is not part of it: sidecars that keep away from our volumes, resources, tolerations, variables.

use std::collections::BTreeMap;

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Container, ExecAction, KeyToPath, PodSpec, Volume, VolumeMount};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::CONTAINER;
use crate::validate::digest_text;

/// Where the trainer's program and libraries are, and what it reads and writes. What is mounted elsewhere it does not look at.
const ITS_FOLDERS: [&str; 14] = [
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/sbin",
    "/dev",
    "/proc",
    "/sys",
    "/tmp",
    "/data",
    "/sources",
    "/etc/finetune",
    "/etc/finetune-certificates",
    "/etc/ld.so.preload",
];

/// [`pod_digest`] of what a Job makes.
pub fn job_digest(job: &Job) -> Option<String> {
    job.spec.as_ref()?.template.spec.as_ref().map(pod_digest)
}

/// Whether a Job makes one pod at a time, and no second one that succeeds.
pub fn makes_one_pod(job: &Job) -> bool {
    let is_one = |number: Option<i32>| number.unwrap_or(1) == 1;
    job.spec.as_ref().is_some_and(|spec| is_one(spec.parallelism) && is_one(spec.completions))
}

/// `sha256:…`, the same for the pod of a Job and for its template.
pub fn pod_digest(spec: &PodSpec) -> String {
    digest_text(&Sha256::digest(json(&essence(spec))))
}

/// In what one pod is not the trainer that another one is, in words of the API.
pub fn differences(one: &PodSpec, other: &PodSpec) -> Vec<String> {
    let (one, other) = (essence(one), essence(other));
    one.into_iter().filter(|(name, value)| other.get(name) != Some(value)).map(|(name, _)| name.to_owned()).collect()
}

/// What decides about what runs, and what may speak for it, each as JSON. An image that is named by its digest is known by that:
/// mirrors may give it another name.
fn essence(spec: &PodSpec) -> BTreeMap<&'static str, String> {
    let nobody = Container::default();
    let trainer = spec.containers.iter().find(|container| container.name == CONTAINER);
    let is_there = trainer.is_some();
    let trainer = trainer.unwrap_or(&nobody);
    let volumes: BTreeMap<&str, Source> =
        spec.volumes.iter().flatten().map(|volume| (volume.name.as_str(), source(volume))).collect();
    let mounts = mounts(trainer, &volumes);
    let of_ours = |mount: &VolumeMount| {
        let claim = volumes.get(mount.name.as_str()).and_then(|source| source.claim);
        let is_ours = |ours: &Mount| {
            let of_trainer = ours.source.and_then(|source| source.claim);
            ours.volume == mount.name || claim.is_some_and(|claim| of_trainer.is_some_and(|ours| ours.0 == claim.0))
        };
        mounts.iter().any(is_ours)
    };
    // Whoever else writes where the trainer does may say anything in its name.
    let others = spec.containers.iter().filter(|container| container.name != CONTAINER);
    let others = others.chain(spec.init_containers.iter().flatten()).map(|other| (&other.name, &other.volume_mounts));
    let visitors = spec.ephemeral_containers.iter().flatten().map(|other| (&other.name, &other.volume_mounts));
    let guests: Vec<&String> = others
        .chain(visitors)
        .filter(|(_, mounts)| mounts.iter().flatten().any(of_ours))
        .map(|(name, _)| name)
        .collect();
    let loader: BTreeMap<&str, Option<&str>> = trainer
        .env
        .iter()
        .flatten()
        .filter(|variable| variable.name.starts_with("LD_"))
        .map(|variable| (variable.name.as_str(), variable.value.as_deref()))
        .collect();
    // Programs that the kubelet starts beside it, in its container.
    let hooks = trainer.lifecycle.iter().flat_map(|hooks| hooks.post_start.iter().chain(&hooks.pre_stop));
    let probes = trainer.liveness_probe.iter().chain(&trainer.readiness_probe).chain(&trainer.startup_probe);
    let programs: Vec<&ExecAction> =
        hooks.filter_map(|hook| hook.exec.as_ref()).chain(probes.filter_map(|probe| probe.exec.as_ref())).collect();
    let shares = [spec.host_pid, spec.host_ipc, spec.share_process_namespace].map(|shared| shared.unwrap_or(false));
    BTreeMap::from([
        ("containers", json(&is_there)),
        ("image", json(&trainer.image.as_deref().map(|image| image.rsplit('@').next()))),
        ("command", json(&trainer.command.as_ref().filter(|command| !command.is_empty()))),
        ("args", json(&trainer.args)),
        ("workingDir", json(&trainer.working_dir)),
        ("terminationMessagePath", json(&trainer.termination_message_path)),
        ("env (LD_*)", json(&loader)),
        ("envFrom", json(&trainer.env_from.as_ref().filter(|sources| !sources.is_empty()))),
        ("exec of lifecycle and probes", json(&programs)),
        ("restartPolicy", json(&spec.restart_policy)),
        ("volumeMounts", json(&mounts)),
        ("volumes that other containers mount too", json(&guests)),
        ("hostPID, hostIPC, shareProcessNamespace", json(&shares)),
    ])
}

/// Of structs and sorted maps alone: the order of the keys of a `Value` depends on what else is built beside.
fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("strings, numbers and lists are JSON")
}

#[derive(Serialize)]
struct Mount<'a> {
    path: &'a str,
    part: (Option<&'a String>, Option<&'a String>),
    read_only: bool,
    volume: &'a str,
    source: Option<&'a Source<'a>>,
}

fn mounts<'a>(trainer: &'a Container, volumes: &'a BTreeMap<&str, Source>) -> Vec<Mount<'a>> {
    let is_within = |path: &str, folder: &str| {
        path.strip_prefix(folder.trim_end_matches('/')).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    // Below one of its folders, or over one.
    let matters = |path: &str| ITS_FOLDERS.iter().any(|folder| is_within(path, folder) || is_within(folder, path));
    let of = |mount: &'a VolumeMount| Mount {
        path: &mount.mount_path,
        part: (mount.sub_path.as_ref(), mount.sub_path_expr.as_ref()),
        read_only: mount.read_only.unwrap_or(false),
        volume: &mount.name,
        source: volumes.get(mount.name.as_str()),
    };
    let all = trainer.volume_mounts.iter().flatten();
    let mut mounts: Vec<Mount> = all.filter(|mount| matters(&mount.mount_path)).map(of).collect();
    mounts.sort_by_key(|mount| mount.path);
    mounts
}

/// Of a volume, whose content it is.
#[derive(Serialize)]
struct Source<'a> {
    claim: Option<(&'a str, bool)>,
    maps: Vec<Option<Files<'a>>>,
    config_map: Option<Files<'a>>,
    secret: Option<(&'a Option<String>, Vec<(&'a str, &'a str)>)>,
    host_path: Option<&'a str>,
    scratch: bool,
}

/// Name, and key and path of each file.
type Files<'a> = (&'a str, Vec<(&'a str, &'a str)>);

fn source(volume: &Volume) -> Source<'_> {
    fn files(items: Option<&Vec<KeyToPath>>) -> Vec<(&str, &str)> {
        items.into_iter().flatten().map(|item| (item.key.as_str(), item.path.as_str())).collect()
    }
    let sources = volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten());
    let claim = volume.persistent_volume_claim.as_ref();
    Source {
        claim: claim.map(|claim| (claim.claim_name.as_str(), claim.read_only.unwrap_or(false))),
        maps: sources
            .map(|source| source.config_map.as_ref().map(|map| (map.name.as_str(), files(map.items.as_ref()))))
            .collect(),
        config_map: volume.config_map.as_ref().map(|map| (map.name.as_str(), files(map.items.as_ref()))),
        secret: volume.secret.as_ref().map(|secret| (&secret.secret_name, files(secret.items.as_ref()))),
        host_path: volume.host_path.as_ref().map(|host| host.path.as_str()),
        scratch: volume.empty_dir.is_some(),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::EnvVar;
    use serde_json::{Value, from_value, json};

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
            (
                "secrets of an agent",
                digest(|spec| {
                    push(spec, "/volumes", json!({"name": "vault-secrets", "emptyDir": {"medium": "Memory"}}));
                    let mounts = json!([{"name": "vault-secrets", "mountPath": "/vault/secrets"}]);
                    push(spec, "/containers", json!({"name": "agent", "image": "vault", "volumeMounts": mounts}));
                    push(spec, "/containers/0/volumeMounts", mounts[0].clone());
                }),
            ),
            (
                "certificates",
                digest(|spec| {
                    push(spec, "/volumes", json!({"name": "authorities", "configMap": {"name": "authorities"}}));
                    let mount = json!({"name": "authorities", "mountPath": "/etc/ssl/certs", "readOnly": true});
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
            (
                "a guest on the claim, by another volume",
                digest(|spec| {
                    let claim = json!({"name": "mine", "persistentVolumeClaim": {"claimName": "bot-0b8e1c9e"}});
                    push(spec, "/volumes", claim);
                    let mounts = json!([{"name": "mine", "mountPath": "/x"}]);
                    push(spec, "/containers", json!({"name": "guest", "image": "busybox", "volumeMounts": mounts}));
                }),
            ),
            (
                "a guest that came later",
                digest(|spec| {
                    let mounts = json!([{"name": "data", "mountPath": "/data"}]);
                    spec["ephemeralContainers"] =
                        json!([{"name": "guest", "image": "busybox", "volumeMounts": mounts}]);
                }),
            ),
            (
                "libraries of its own",
                digest(|spec| {
                    push(spec, "/volumes", json!({"name": "mine", "emptyDir": {}}));
                    push(
                        spec,
                        "/containers/0/volumeMounts",
                        json!({"name": "mine", "mountPath": "/usr/lib/x86_64-linux-gnu"}),
                    );
                }),
            ),
            (
                "another root",
                digest(|spec| {
                    push(spec, "/volumes", json!({"name": "mine", "emptyDir": {}}));
                    push(spec, "/containers/0/volumeMounts", json!({"name": "mine", "mountPath": "/"}));
                }),
            ),
            (
                "variables from elsewhere",
                digest(|spec| spec["containers"][0]["envFrom"] = json!([{"configMapRef": {"name": "mine"}}])),
            ),
            (
                "a program beside it",
                digest(|spec| {
                    spec["containers"][0]["lifecycle"] = json!({"postStart": {"exec": {"command": ["/data/x"]}}});
                }),
            ),
            (
                "a probe that is a program",
                digest(|spec| spec["containers"][0]["livenessProbe"] = json!({"exec": {"command": ["/data/x"]}})),
            ),
            (
                "another part of the volume",
                digest(|spec| spec["containers"][0]["volumeMounts"][0]["subPathExpr"] = json!("$(X)")),
            ),
            (
                "another file of the configuration",
                digest(|spec| {
                    spec["volumes"][1]["projected"]["sources"][0]["configMap"]["items"][0]["path"] = json!("x.yaml");
                }),
            ),
            ("a trainer that starts again", digest(|spec| spec["restartPolicy"] = json!("Always"))),
            ("no trainer", digest(|spec| spec["containers"][0]["name"] = json!("other"))),
        ] {
            assert_ne!(found, expected, "{what}");
        }
    }

    #[test]
    fn what_differs_is_told_by_name() {
        let [one, mut other]: [PodSpec; 2] = std::array::from_fn(|_| from_value(template()).expect("a pod"));
        assert_eq!(differences(&one, &other), Vec::<String>::new());
        other.containers[0].image = Some("mirror.example/trainer:1".into());
        other.containers[0].env = Some(vec![EnvVar { name: "LD_PRELOAD".into(), ..EnvVar::default() }]);
        assert_eq!(differences(&one, &other), ["env (LD_*)", "image"]);
    }

    /// Statuses hold digests, and the next version of the operator compares with them.
    #[test]
    fn a_digest_is_the_same_whatever_is_built_beside() {
        assert_eq!(digest(|_| {}), "sha256:3d4baea506257eaef5325d7ac39b2593412e189f391541e2c9a8753e10d5a04d");
    }
}
