//! The test cluster itself: what the tests of the operator stand on.

use std::path::Path;
use std::process::Command;

use harness::cluster::{Cluster, MINUTE, build_image, restricted_pod, wait_for};

#[test]
fn the_node_is_ready_and_has_the_pinned_version() {
    let Some(cluster) = Cluster::shared() else { return };
    let node = cluster.get(&["node", "node1"]).expect("node1 exists");
    let ready = node["status"]["conditions"].as_array().expect("conditions").iter().find(|one| one["type"] == "Ready");
    assert_eq!(ready.expect("a Ready condition")["status"], "True");
    assert_eq!(node["status"]["nodeInfo"]["kubeletVersion"], "v1.36.2");
}

#[test]
fn a_pod_runs_an_image_that_is_pulled_by_digest() {
    let Some(cluster) = Cluster::shared() else { return };
    let namespace = cluster.namespace("pull");
    let image = cluster.busybox();
    assert!(image.contains("@sha256:"), "{image}");
    namespace.apply(&restricted_pod("hello", image, &["echo", "hello"], ""));
    assert_eq!(namespace.succeeded("hello"), "hello\n");
    let pod = namespace.get(&["pod", "hello"]).expect("the pod exists");
    assert_eq!(pod["status"]["containerStatuses"][0]["imageID"], image);
}

#[test]
fn a_pod_that_is_not_restricted_is_refused() {
    let Some(cluster) = Cluster::shared() else { return };
    let namespace = cluster.namespace("restricted");
    let pod =
        restricted_pod("root", cluster.busybox(), &["id"], "").replace("runAsNonRoot: true", "runAsNonRoot: false");
    let refused = cluster.try_apply(namespace.name(), &pod).expect_err("Pod Security refuses it");
    assert!(refused.contains(r#"violates PodSecurity "restricted:latest""#), "{refused}");
}

#[test]
fn a_service_is_found_by_its_name() {
    let Some(cluster) = Cluster::shared() else { return };
    let namespace = cluster.namespace("dns");
    let image = cluster.busybox();
    let server = restricted_pod(
        "server",
        image,
        &["httpd", "-f", "-p", "8080", "-h", "/bin"],
        "      readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}",
    );
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {selector: {app: server}, ports: [{port: 80, targetPort: 8080}]}\n";
    namespace.apply(&format!("{server}---\n{service}"));
    namespace.kubectl(&["wait", "--for=condition=Ready", "pod/server", "--timeout=60s"]);
    let name = format!("web.{}.svc.cluster.local", namespace.name());
    // The rules follow the endpoint by a moment, so the client tries until it is answered.
    let ask = format!(
        "for try in $(seq 50); do printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 2 {name} 80 | grep HTTP && exit; sleep 0.2; done; exit 1"
    );
    namespace.apply(&restricted_pod("client", image, &["sh", "-c", &ask], ""));
    assert!(namespace.succeeded("client").starts_with("HTTP/1."));
}

#[test]
fn a_volume_is_made_and_keeps_what_a_pod_wrote() {
    let Some(cluster) = Cluster::shared() else { return };
    let namespace = cluster.namespace("volume");
    let claim = "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: data}\nspec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Mi}}}\n";
    let mounted = "      volumeMounts: [{name: data, mountPath: /data}]\n  volumes: [{name: data, persistentVolumeClaim: {claimName: data}}]";
    let image = cluster.busybox();
    let writer = restricted_pod("writer", image, &["sh", "-c", "echo kept > /data/file"], mounted);
    namespace.apply(&format!("{claim}---\n{writer}"));
    namespace.succeeded("writer");
    assert_eq!(namespace.get(&["persistentvolumeclaim", "data"]).expect("the claim")["status"]["phase"], "Bound");
    namespace.apply(&restricted_pod("reader", image, &["cat", "/data/file"], mounted));
    assert_eq!(namespace.succeeded("reader"), "kept\n");
}

#[test]
fn one_gpu_runs_one_pod_at_a_time() {
    let Some(cluster) = Cluster::shared() else { return };
    let namespace = cluster.namespace("gpu");
    // A resource of this test alone: other tests count GPUs too.
    cluster.set_capacity("node1", "example.com/gpu-of-one-test", 1);
    let limits = "      resources: {limits: {example.com/gpu-of-one-test: \"1\"}}";
    let image = cluster.busybox();
    let first = ["sh", "-c", "trap 'exit 0' TERM; while true; do sleep 0.1; done"];
    namespace.apply(&restricted_pod("first", image, &first, limits));
    namespace.kubectl(&["wait", "--for=condition=Ready", "pod/first", "--timeout=60s"]);
    namespace.apply(&restricted_pod("second", image, &["echo", "my turn"], limits));
    wait_for("the scheduler to say that no GPU is free", MINUTE, || {
        let pod = namespace.get(&["pod", "second"])?;
        let message = pod["status"]["conditions"][0]["message"].as_str().unwrap_or_default();
        if message.contains("Insufficient example.com/gpu-of-one-test") {
            Ok(())
        } else {
            Err(pod["status"].to_string())
        }
    });
    namespace.kubectl(&["delete", "pod", "first"]);
    assert_eq!(namespace.succeeded("second"), "my turn\n");
}

#[test]
fn a_container_that_is_killed_says_so() {
    let Some(cluster) = Cluster::shared() else { return };
    let namespace = cluster.namespace("kill");
    namespace.apply(&restricted_pod("victim", cluster.busybox(), &["sleep", "3600"], ""));
    namespace.kubectl(&["wait", "--for=condition=Ready", "pod/victim", "--timeout=60s"]);
    namespace.kill_container("victim");
    let code = wait_for("the container's exit code", MINUTE, || {
        let pod = namespace.get(&["pod", "victim"])?;
        let code = pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"].as_i64();
        code.ok_or_else(|| pod["status"].to_string())
    });
    assert_eq!(code, 137);
}

#[test]
fn a_further_node_joins_and_its_loss_of_power_is_noticed() {
    let Some(cluster) = Cluster::shared() else { return };
    let namespace = cluster.namespace("power");
    let node = cluster.node();
    // Pulls through the first node's registry, and its log comes through the API server: traffic both ways.
    let pod = restricted_pod("far", cluster.busybox(), &["sh", "-c", "echo here; sleep 3600"], &node.placement());
    namespace.apply(&pod);
    namespace.kubectl(&["wait", "--for=condition=Ready", "pod/far", "--timeout=60s"]);
    assert_eq!(namespace.kubectl(&["logs", "far"]), "here\n");
    node.power_off();
    wait_for("the pod's eviction", MINUTE, || {
        let pod = namespace.get(&["pod", "far"])?;
        let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let disrupted = conditions.iter().any(|one| one["type"] == "DisruptionTarget" && one["status"] == "True");
        if disrupted && !pod["metadata"]["deletionTimestamp"].is_null() {
            Ok(())
        } else {
            Err(pod["status"].to_string())
        }
    });
}

#[test]
fn the_trainer_image_runs_without_root_and_without_a_writable_root() {
    let Some(cluster) = Cluster::shared() else { return };
    let image = cluster.product_image("trainer");
    let namespace = cluster.namespace("trainer");
    // The entrypoint, as the operator uses it.
    let pod = restricted_pod("trainer", &image, &[], "      args: [--version]").replace("      command: []\n", "");
    namespace.apply(&pod);
    assert!(namespace.succeeded("trainer").starts_with("finetune-trainer "));
}

#[test]
fn an_image_is_the_same_each_time() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (archive, digest) = build_image("trainer", folder.path());
    let first = sha256(&archive);
    let (archive, again) = build_image("trainer", folder.path());
    assert_eq!((first, digest), (sha256(&archive), again));
}

fn sha256(file: &Path) -> String {
    let output = Command::new("sha256sum").arg(file).output().expect("sha256sum runs");
    assert!(output.status.success(), "{}: {}", file.display(), String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("a line of text")
}

#[test]
fn nothing_is_left_on_the_host() {
    // Also the check that the machine can run a cluster at all.
    let Some(cluster) = Cluster::shared() else { return };
    let run_dir = cluster.run_dir().with_extension("leaks");
    let output = Command::new(harness::repository().join("tests/cluster/leaks.sh"))
        .arg(&run_dir)
        .output()
        .expect("the script starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::remove_dir_all(&run_dir).expect("logs can be removed");
}
