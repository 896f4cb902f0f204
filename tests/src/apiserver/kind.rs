//! The kinds that are served, and where they stand in a URL.

/// A kind of object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `finetune.dev/v1alpha1`
    FineTuneJob,
    /// `batch/v1`
    Job,
    /// `v1`
    Pod,
    /// `v1`
    ConfigMap,
    /// `v1`
    PersistentVolumeClaim,
    /// `events.k8s.io/v1`, and `v1` in its older form.
    Event,
    /// `coordination.k8s.io/v1`
    Lease,
    /// `v1`, of the cluster.
    Node,
    /// `storage.k8s.io/v1`, of the cluster.
    StorageClass,
    /// `kueue.x-k8s.io`, where Kueue is installed.
    Workload,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 10] = [
        Self::FineTuneJob,
        Self::Job,
        Self::Pod,
        Self::ConfigMap,
        Self::PersistentVolumeClaim,
        Self::Event,
        Self::Lease,
        Self::Node,
        Self::StorageClass,
        Self::Workload,
    ];

    /// As in a URL.
    pub const fn plural(self) -> &'static str {
        match self {
            Self::FineTuneJob => "finetunejobs",
            Self::Job => "jobs",
            Self::Pod => "pods",
            Self::ConfigMap => "configmaps",
            Self::PersistentVolumeClaim => "persistentvolumeclaims",
            Self::Event => "events",
            Self::Lease => "leases",
            Self::Node => "nodes",
            Self::StorageClass => "storageclasses",
            Self::Workload => "workloads",
        }
    }

    /// As in `kind` of an object.
    pub const fn name(self) -> &'static str {
        match self {
            Self::FineTuneJob => "FineTuneJob",
            Self::Job => "Job",
            Self::Pod => "Pod",
            Self::ConfigMap => "ConfigMap",
            Self::PersistentVolumeClaim => "PersistentVolumeClaim",
            Self::Event => "Event",
            Self::Lease => "Lease",
            Self::Node => "Node",
            Self::StorageClass => "StorageClass",
            Self::Workload => "Workload",
        }
    }

    /// API groups in which it is served.
    pub const fn groups(self) -> &'static [&'static str] {
        match self {
            Self::FineTuneJob => &["finetune.dev"],
            Self::Job => &["batch"],
            Self::Pod | Self::ConfigMap | Self::PersistentVolumeClaim | Self::Node => &[""],
            Self::Event => &["", "events.k8s.io"],
            Self::Lease => &["coordination.k8s.io"],
            Self::StorageClass => &["storage.k8s.io"],
            Self::Workload => &["kueue.x-k8s.io"],
        }
    }

    /// Whether its objects lie in namespaces.
    pub const fn is_namespaced(self) -> bool {
        !matches!(self, Self::Node | Self::StorageClass)
    }

    /// Whether its status is written through an endpoint of its own, and through no other.
    pub const fn has_status(self) -> bool {
        matches!(
            self,
            Self::FineTuneJob | Self::Job | Self::Pod | Self::PersistentVolumeClaim | Self::Node | Self::Workload
        )
    }
}

/// What a URL names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// API group; empty for the core.
    pub group: String,
    /// API version.
    pub version: String,
    /// The kind.
    pub kind: Kind,
    /// Absent: all namespaces, or an object of the cluster.
    pub namespace: Option<String>,
    /// Absent: the collection.
    pub name: Option<String>,
    /// For example `status`.
    pub subresource: Option<String>,
}

impl Place {
    /// From the path of a URL; none if nothing is served there.
    pub fn parse(path: &str) -> Option<Self> {
        let mut parts = path.trim_matches('/').split('/');
        let (group, version) = match parts.next()? {
            "api" => ("", parts.next()?),
            "apis" => (parts.next()?, parts.next()?),
            _ => return None,
        };
        let mut rest: Vec<&str> = parts.collect();
        let mut namespace = None;
        if rest.first() == Some(&"namespaces") && rest.len() >= 3 {
            namespace = Some(rest[1].to_owned());
            rest.drain(..2);
        }
        let kind = Kind::ALL.into_iter().find(|kind| rest.first() == Some(&kind.plural()))?;
        (kind.groups().contains(&group) && rest.len() <= 3).then(|| Self {
            group: group.to_owned(),
            version: version.to_owned(),
            kind,
            namespace,
            name: rest.get(1).map(|name| (*name).to_owned()),
            subresource: rest.get(2).map(|name| (*name).to_owned()),
        })
    }

    /// As in `apiVersion` of an object.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }

    /// As a right names it: `finetunejobs/status`.
    pub fn resource(&self) -> String {
        let plural = self.kind.plural();
        self.subresource.as_ref().map_or_else(|| plural.to_owned(), |sub| format!("{plural}/{sub}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_places() {
        let place = |path: &str| Place::parse(path).expect(path);
        let status = place("/apis/finetune.dev/v1alpha1/namespaces/team/finetunejobs/bot/status");
        assert_eq!((status.kind, status.resource().as_str()), (Kind::FineTuneJob, "finetunejobs/status"));
        assert_eq!((status.namespace.as_deref(), status.name.as_deref()), (Some("team"), Some("bot")));
        let pods = place("/api/v1/pods");
        assert_eq!((pods.kind, pods.namespace, pods.name), (Kind::Pod, None, None));
        assert_eq!(place("/api/v1/nodes/node-1").name.as_deref(), Some("node-1"));
        assert_eq!(place("/apis/events.k8s.io/v1/namespaces/team/events").api_version(), "events.k8s.io/v1");
        for nowhere in ["/apis/batch/v1/pods", "/healthz", "/api/v1/secrets"] {
            assert_eq!(Place::parse(nowhere), None, "{nowhere}");
        }
    }
}
