//! What `helm install` makes of a cluster that is not empty: each works, or is refused with what to do.

use harness::kube_apiserver::KubeApiServer;

use super::{chart, program};

/// An API server on which this test alone installs.
struct Server(KubeApiServer);

impl Server {
    fn start() -> Self {
        Self(KubeApiServer::start())
    }

    fn kubectl(&self, arguments: &[&str]) -> String {
        let said = self.0.ask(&program("kubectl"), arguments, "");
        said.unwrap_or_else(|said| panic!("kubectl {arguments:?}: {said}"))
    }

    /// `helm VERB RELEASE` in a namespace of the release's name.
    fn helm(&self, verb: &str, release: &str, more: &[&str]) -> Result<String, String> {
        let chart = chart();
        let chart = chart.to_str().expect("a UTF-8 path");
        let arguments = [&[verb, release, chart, "--namespace", release], more].concat();
        self.0.ask(&program("helm"), &arguments, "")
    }

    fn install(&self, release: &str, more: &[&str]) -> Result<String, String> {
        self.helm("install", release, &[&["--create-namespace"], more].concat())
    }

    fn uninstall(&self, release: &str) {
        let said = self.0.ask(&program("helm"), &["uninstall", release, "--namespace", release], "");
        said.unwrap_or_else(|said| panic!("{release}: {said}"));
    }
}

fn taken(said: Result<String, String>) {
    said.unwrap_or_else(|said| panic!("{said}"));
}

fn refused(said: Result<String, String>, expected: &[&str]) {
    let said = said.expect_err("it must be refused");
    for expected in expected {
        assert!(said.contains(expected), "expected {expected:?} in {said}");
    }
}

const CRD: &str = "finetunejobs.finetune.dev";

#[test]
fn a_crd_of_another_release_is_shared_or_taken_over_as_the_refusal_says() {
    let server = Server::start();
    taken(server.install("first", &[]));
    taken(server.helm("upgrade", "first", &[]));
    let remedies = ["--set crds.enabled=false", "--take-ownership --set crds.takeOwnership=true"];
    server.uninstall("first");
    // It was kept, and with it every job.
    assert!(server.kubectl(&["get", "crd", "--output=name"]).contains(CRD));
    taken(server.install("first", &[]));
    server.uninstall("first");

    let belongs =
        "the CRD finetunejobs.finetune.dev is there already and belongs to the release first of the namespace first";
    refused(server.install("second", &[]), &[&[belongs], &remedies[..]].concat());
    taken(server.install("second", &["--set", "crds.enabled=false"]));
    server.uninstall("second");
    taken(server.install("third", &["--take-ownership", "--set", "crds.takeOwnership=true"]));
    let owner =
        server.kubectl(&["get", "crd", CRD, "--output=jsonpath={.metadata.annotations.meta\\.helm\\.sh/release-name}"]);
    assert_eq!(owner, "third");
    // It is its own from then on.
    taken(server.helm("upgrade", "third", &[]));
    server.uninstall("third");

    server.kubectl(&["annotate", "crd", CRD, "meta.helm.sh/release-name-", "meta.helm.sh/release-namespace-"]);
    refused(server.install("fourth", &[]), &[&["was not installed by Helm"], &remedies[..]].concat());
    taken(server.install("fourth", &["--take-ownership", "--set", "crds.takeOwnership=true"]));
    // The remedy of the runbooks for a CRD that is older than the operator.
    let file = harness::repository().join("crds/finetunejobs.yaml");
    let file = format!("--filename={}", file.display());
    server.kubectl(&[
        "patch",
        "crd",
        CRD,
        "--type=json",
        "--patch",
        "[{\"op\": \"remove\", \"path\": \"/spec/names/shortNames\"}]",
    ]);
    server.kubectl(&["apply", "--server-side", "--force-conflicts", &file]);
    let names = server.kubectl(&["get", "crd", CRD, "--output=jsonpath={.spec.names.shortNames}"]);
    assert_eq!(names, "[\"ftj\"]");
}

#[test]
fn no_two_releases_serve_one_namespace() {
    let server = Server::start();
    for namespace in ["team-a", "team-b", "team-c"] {
        server.kubectl(&["create", "namespace", namespace]);
    }
    let shared = ["--set", "crds.enabled=false"];
    let watch = |release: &str, verb: &str, namespaces: &str| {
        let namespaces = format!("watchNamespaces={{{namespaces}}}");
        let create: &[&str] = if verb == "install" { &["--create-namespace"] } else { &[] };
        server.helm(verb, release, &[create, &shared, &["--set", &namespaces]].concat())
    };
    taken(server.install("first", &[]));
    refused(
        server.install("second", &shared),
        &["the release first of the namespace first serves all namespaces already", "watchNamespaces", "uninstall"],
    );
    refused(watch("second", "install", "team-a"), &["the release first of the namespace first serves team-a already"]);
    taken(server.helm("upgrade", "first", &["--set", "watchNamespaces={team-a,team-b}"]));
    refused(
        server.install("second", &shared),
        &["the release first of the namespace first serves team-a, team-b already"],
    );
    refused(watch("second", "install", "team-b,team-c"), &["serves team-b already"]);
    taken(watch("second", "install", "team-c"));
    refused(watch("second", "upgrade", "team-c,team-a"), &["serves team-a already"]);
    refused(
        server.helm("upgrade", "first", &["--reset-values"]),
        &["the release second of the namespace second serves team-c already"],
    );
    taken(server.helm("upgrade", "first", &["--reset-values", "--set", "checkOtherReleases=false"]));
    server.uninstall("second");
    taken(server.helm("upgrade", "first", &["--reset-values"]));
}

/// Who may do nothing outside of his namespace is told what is asked for, and how to do without.
#[test]
fn an_installer_without_rights_in_the_cluster_can_say_so() {
    let server = Server::start();
    taken(server.install("first", &["--set", "checkOtherReleases=false"]));
    server.uninstall("first");
    server.kubectl(&["create", "namespace", "team"]);
    server.kubectl(&["create", "rolebinding", "low", "--namespace=team", "--clusterrole=cluster-admin", "--user=low"]);
    let low = [
        "--kube-as-user=low",
        "--set",
        "crds.enabled=false,watchNamespaces={team},rbac.aggregateClusterRoles=false,childPolicy.enabled=false",
    ];
    refused(server.helm("install", "team", &low), &["cannot list resource \"deployments\"", "at the cluster scope"]);
    taken(server.helm("install", "team", &[&low[..], &["--set", "checkOtherReleases=false"]].concat()));
}
