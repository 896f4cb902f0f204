//! The chart's release while jobs run: replicas, upgrades, and an operator that is uninstalled and comes back.

use std::time::{Duration, Instant};

use harness::cluster::wait_for;
use harness::operator::{FEW_MINUTES, Operator, SYSTEM};

use super::{LONG, artifact, long_adapter};

/// A lease lasts 15 s and is asked for every 2 s.
const TAKEOVER: Duration = Duration::from_secs(20);

fn leader(operator: &Operator) -> Result<String, String> {
    let leases = operator.cluster.get(&["leases", "--namespace", SYSTEM])?;
    let [lease] = &leases["items"].as_array().cloned().unwrap_or_default()[..] else { return Err(leases.to_string()) };
    let holder = lease["spec"]["holderIdentity"].as_str().unwrap_or_default();
    if holder.is_empty() { Err("nobody leads".into()) } else { Ok(holder.to_owned()) }
}

#[test]
fn a_standby_leads_within_seconds_of_the_leaders_silence_or_end_and_nothing_is_done_twice() {
    let Some(operator) = Operator::shared() else { return };
    let disturbed = operator.disturb();
    let space = disturbed.workspace("replicas");
    operator.helm("upgrade", &["--set", "replicaCount=2"]);
    let pods = space.watch("bot");
    space.job("bot", LONG);
    space.trains("bot");
    let leading = || {
        wait_for("a leader", FEW_MINUTES, || {
            let leader = leader(operator)?;
            if operator.pods().contains(&leader) { Ok(leader) } else { Err(format!("{leader} is gone")) }
        })
    };
    let replaced = |first: &str| {
        let since = Instant::now();
        wait_for("another leader", TAKEOVER, || match leader(operator)? {
            second if second == first => Err(format!("{first} leads")),
            second => Ok(second),
        });
        assert!(since.elapsed() < TAKEOVER, "{:?}", since.elapsed());
    };
    // One that hangs gives nothing back, and does not know it.
    let first = leading();
    operator.cluster.freeze(SYSTEM, &first, || replaced(&first));
    let second = leading();
    operator.cluster.kubectl(&["delete", "pod", &second, "--namespace", SYSTEM, "--force", "--grace-period=0"]);
    replaced(&second);
    let status = space.succeeded("bot");
    assert_eq!((artifact(&status).as_str(), &status["attempts"]["total"]), (long_adapter(), &1.into()), "{status:#}");
    assert_eq!(pods.one_after_another().len(), 3);
    let made = operator.cluster.created(space.namespace.name(), "jobs");
    assert_eq!(made, ["bot-prepare-1", "bot-train-1", "bot-publish-1"]);
}

#[test]
fn an_upgrade_and_a_reinstallation_are_not_noticed_by_a_running_job() {
    let Some(operator) = Operator::shared() else { return };
    let disturbed = operator.disturb();
    let space = disturbed.workspace("upgrade");
    space.job("bot", LONG);
    let pod = space.trains("bot");
    let uid = || space.namespace.get(&["pod", &pod]).expect("it runs")["metadata"]["uid"].clone();
    let (before, accepted) = (uid(), space.status("bot")["resolved"].clone());
    let other = ["--set", "profiles.default.resources.limits.memory=3Gi"];
    space.namespace.freeze(&pod, || {
        operator.helm("upgrade", &other);
        assert_eq!(uid(), before);
        operator.cluster.command("enter", &["helm", "uninstall", "finetune", "--namespace", SYSTEM, "--wait"]);
        wait_for("the operator to be gone", FEW_MINUTES, || {
            let pods = operator.pods();
            if pods.is_empty() { Ok(()) } else { Err(format!("{pods:?}")) }
        });
        assert_eq!(uid(), before);
        operator.helm("install", &other);
        assert_eq!(uid(), before);
    });
    // An attempt that begins now has the plan that the job was accepted with, and a new job today's.
    space.namespace.kubectl(&["delete", "pod", &pod, "--wait=false"]);
    space.job("next", LONG);
    let memory = |job: &str| {
        wait_for(format!("the Job {job}"), FEW_MINUTES, || {
            let found = space.namespace.get(&["job", job])?;
            Ok(found["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"].clone())
        })
    };
    assert_eq!((memory("bot-train-2"), memory("next-train-1")), ("2Gi".into(), "3Gi".into()));
    let status = space.succeeded("bot");
    assert_eq!(artifact(&status), long_adapter());
    assert_eq!(status["resolved"]["image"], accepted["image"]);
    assert_eq!(status["attempts"]["preempted"], 1, "{status:#}");
}
