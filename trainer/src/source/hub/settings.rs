//! How the hub is reached, from the variables that `huggingface_hub` reads.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crds::exit::ExitCode;
use hf_hub::HFClientSync;

use super::Refusal;

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
            cache.unwrap_or_else(std::env::temp_dir).join("huggingface")
        });
        let stored = || fs::read_to_string(path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"))).ok();
        // A token from a file or a Secret often ends with a newline, and no header may.
        let trimmed = |token: String| Some(token.trim().to_owned()).filter(|token| !token.is_empty());
        let token = variable("HF_TOKEN").and_then(trimmed).or_else(|| stored().and_then(trimmed));
        Self {
            endpoint: variable("HF_ENDPOINT")
                .map_or_else(|| "https://huggingface.co".into(), |endpoint| endpoint.trim_end_matches('/').to_owned()),
            token: token.filter(|_| !is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN")),
            cache: path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE")).unwrap_or_else(|| home.join("hub")),
            offline: is_set("HF_HUB_OFFLINE"),
            patience: variable("HF_HUB_DOWNLOAD_TIMEOUT")
                .and_then(|seconds| seconds.parse().ok())
                .filter(|&seconds| seconds > 0)
                .map_or(Duration::from_mins(1), Duration::from_secs),
        }
    }

    pub(super) fn client(&self) -> Result<HFClientSync, Refusal> {
        let host = self.endpoint.strip_prefix("https://").or_else(|| self.endpoint.strip_prefix("http://"));
        if host.is_none_or(|host| host.is_empty() || host.contains('@')) {
            return Err(Refusal {
                message: "HF_ENDPOINT is not usable; expected http(s)://host without user and password".into(),
                exit: ExitCode::BadConfiguration,
            });
        }
        // Given even where it is the default: hf-hub would take an empty variable at its word.
        let builder = hf_hub::HFClientBuilder::new().endpoint(&self.endpoint).cache_dir(&self.cache);
        let builder = if let Some(token) = &self.token { builder.token(token) } else { builder };
        builder.build_sync().map_err(|_| Refusal::unavailable("no connection to the hub can be set up"))
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
    fn a_token_is_not_printed() {
        let settings = read(&[("HF_TOKEN", " hf_secret\n")]);
        assert_eq!(settings.token.as_deref(), Some("hf_secret"));
        assert!(!format!("{settings:?}").contains("secret"), "{settings:?}");
    }
}
