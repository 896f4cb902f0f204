//! Nodes that a test may break.

use std::sync::atomic::{AtomicU32, Ordering};

use super::{Cluster, TEST_NODE};

/// A further node of one test.
#[derive(Debug)]
pub struct Node<'a> {
    cluster: &'a Cluster,
    number: u32,
}

impl<'a> Node<'a> {
    /// With a taint; absent: that of the tests, by the node's name.
    pub(super) fn start(cluster: &'a Cluster, taint: Option<&str>) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(2);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let node = Self { cluster, number };
        let own = format!("{TEST_NODE}={}:NoSchedule", node.name());
        cluster.command("node-up", &[&number.to_string(), taint.unwrap_or(&own)]);
        node
    }

    /// Its name.
    pub fn name(&self) -> String {
        format!("node{}", self.number)
    }

    /// Pulls the plug: kubelet, container runtime and containers vanish at once, and nobody is told.
    pub fn power_off(&self) {
        self.cluster.command("node-off", &[&self.number.to_string()]);
    }

    /// The lines of a pod's spec that bring it here, for the end of [`restricted_pod`](super::restricted_pod).
    pub fn placement(&self) -> String {
        let name = self.name();
        format!(
            "  nodeSelector: {{kubernetes.io/hostname: {name}}}\n  tolerations: [{{key: {TEST_NODE}, value: {name}}}, {{key: node.kubernetes.io/unreachable, tolerationSeconds: 1, effect: NoExecute, operator: Exists}}]"
        )
    }
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        if self.cluster.run_dir.join(self.name()).join("init").exists() {
            self.power_off();
        }
        self.cluster.delete(&["node", &self.name()]);
    }
}
