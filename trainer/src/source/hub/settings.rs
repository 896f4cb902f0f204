//! How the hub is reached, from the variables that `huggingface_hub` reads and two of our own.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// Who reads what is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// Who started the trainer, and can set variables, wait and try again.
    Person,
    /// Who reads the status of a job in a cluster, whose operator tries again.
    Cluster,
}

impl Reader {
    /// What the reader calls the hub's address.
    pub(super) const fn endpoint(self) -> &'static str {
        match self {
            Self::Person => "HF_ENDPOINT",
            Self::Cluster => "the profile's hub.endpoint",
        }
    }

    /// How long an outage is waited for. In a cluster a pod of prepare takes no accelerator, and the operator comes again.
    const fn patience(self) -> Duration {
        match self {
            Self::Person => Duration::from_mins(1),
            Self::Cluster => Duration::from_mins(5),
        }
    }
}

/// How the hub is reached. The token is not printed.
#[derive(Clone)]
pub struct HubSettings {
    /// `HF_ENDPOINT`, without a slash at the end.
    pub endpoint: String,
    /// `HF_TOKEN`, or what `hf auth login` stored.
    pub token: Option<String>,
    /// `HF_HUB_CACHE`, or a folder of `HF_HOME`.
    pub cache: PathBuf,
    /// `HF_HUB_OFFLINE`: only what is in the cache.
    pub offline: bool,
    /// `HF_HUB_DOWNLOAD_TIMEOUT`: how long the hub may be silent.
    pub patience: Duration,
    /// `FINETUNE_HUB_PATIENCE`: how long an outage is waited for.
    pub outage: Duration,
    /// Of a cluster where `POD_UID` is set.
    pub reader: Reader,
}

impl HubSettings {
    /// From the variables that `huggingface_hub` reads, in its order of precedence.
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> Self {
        let path = |name: &str| variable(name).map(PathBuf::from);
        let is_set = |name: &str| {
            variable(name).is_some_and(|value| ["1", "on", "yes", "true"].contains(&value.to_lowercase().as_str()))
        };
        let home = path("HF_HOME").unwrap_or_else(|| {
            let cache = path("XDG_CACHE_HOME").or_else(|| path("HOME").map(|home| home.join(".cache")));
            // Not where files are temporary: that is small, and gone with the pod.
            cache.unwrap_or_else(|| PathBuf::from(".cache")).join("huggingface")
        });
        let stored = || fs::read_to_string(path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"))).ok();
        // A token from a file or a Secret often ends with a newline, and no header may.
        let trimmed = |token: String| Some(token.trim().to_owned()).filter(|token| !token.is_empty());
        let token = variable("HF_TOKEN").and_then(trimmed).or_else(|| stored().and_then(trimmed));
        let seconds = |name: &str| variable(name).and_then(|text| text.parse().ok()).map(Duration::from_secs);
        let reader = if variable("POD_UID").is_some() { Reader::Cluster } else { Reader::Person };
        Self {
            endpoint: variable("HF_ENDPOINT")
                .map_or_else(|| "https://huggingface.co".into(), |endpoint| endpoint.trim_end_matches('/').to_owned()),
            token: token.filter(|_| !is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN")),
            cache: path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE")).unwrap_or_else(|| home.join("hub")),
            offline: is_set("HF_HUB_OFFLINE"),
            patience: seconds("HF_HUB_DOWNLOAD_TIMEOUT")
                .filter(|patience| !patience.is_zero())
                .unwrap_or(Duration::from_mins(1)),
            outage: seconds("FINETUNE_HUB_PATIENCE").unwrap_or_else(|| reader.patience()),
            reader,
        }
    }
}

impl std::fmt::Debug for HubSettings {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("HubSettings")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("cache", &self.cache)
            .field("offline", &self.offline)
            .field("patience", &self.patience)
            .field("outage", &self.outage)
            .field("reader", &self.reader)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn read(variables: &[(&str, &str)]) -> HubSettings {
        let empty_is_unset = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned()).filter(|value| !value.is_empty())
        };
        HubSettings::read(empty_is_unset)
    }

    #[test]
    fn defaults_are_those_of_the_python_library() {
        let settings = read(&[("HOME", "/home/me"), ("HF_ENDPOINT", ""), ("HF_HUB_CACHE", "")]);
        assert_eq!(settings.endpoint, "https://huggingface.co");
        assert_eq!(settings.cache, Path::new("/home/me/.cache/huggingface/hub"));
        assert_eq!((settings.token, settings.offline, settings.patience), (None, false, Duration::from_mins(1)));
    }

    #[test]
    fn the_more_exact_variable_wins() {
        let caches: [(&[(&str, &str)], &str); 4] = [
            (&[("HF_HUB_CACHE", "/a"), ("HUGGINGFACE_HUB_CACHE", "/b"), ("HF_HOME", "/c")], "/a"),
            (&[("HUGGINGFACE_HUB_CACHE", "/b"), ("HF_HOME", "/c")], "/b"),
            (&[("HF_HOME", "/c"), ("XDG_CACHE_HOME", "/d")], "/c/hub"),
            (&[("XDG_CACHE_HOME", "/d"), ("HOME", "/e")], "/d/huggingface/hub"),
        ];
        for (variables, expected) in caches {
            assert_eq!(read(variables).cache, Path::new(expected), "{variables:?}");
        }
        for (value, expected) in [("1", true), ("True", true), ("0", false), ("false", false), ("", false)] {
            assert_eq!(read(&[("HF_HUB_OFFLINE", value)]).offline, expected, "{value}");
        }
        for (value, expected) in [("5", 5), ("0", 60), ("soon", 60)] {
            let patience = read(&[("HF_HUB_DOWNLOAD_TIMEOUT", value)]).patience;
            assert_eq!(patience, Duration::from_secs(expected), "{value}");
        }
    }

    #[test]
    fn an_outage_is_waited_for_longer_where_nobody_waits() {
        let found = |variables: &[(&str, &str)]| {
            let settings = read(variables);
            (settings.reader, settings.outage.as_secs())
        };
        assert_eq!(found(&[]), (Reader::Person, 60));
        assert_eq!(found(&[("POD_UID", "0b8e")]), (Reader::Cluster, 300));
        assert_eq!(found(&[("POD_UID", "0b8e"), ("FINETUNE_HUB_PATIENCE", "0")]), (Reader::Cluster, 0));
        assert_eq!(found(&[("FINETUNE_HUB_PATIENCE", "long")]), (Reader::Person, 60));
    }

    #[test]
    fn a_token_is_not_printed() {
        let settings = read(&[("HF_TOKEN", " hf_secret\n")]);
        assert_eq!(settings.token.as_deref(), Some("hf_secret"));
        assert!(!format!("{settings:?}").contains("secret"), "{settings:?}");
    }
}
