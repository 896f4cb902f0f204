//! A thin wrapper around `tokenizers`: ids with byte offsets, decoding, and the special tokens of a model folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// A tokenizer could not be loaded or used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("{}: cannot be read ({source}); a model folder needs tokenizer.json", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{}: {message}; download the tokenizer again", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What was found.
        message: String,
    },
    /// A text could not be encoded, or ids could not be decoded.
    #[error("the tokenizer failed: {0}")]
    Apply(String),
}

impl Error {
    /// The exit code that this error ends the trainer with.
    pub fn exit(&self) -> crds::exit::ExitCode {
        use crds::exit::ExitCode;
        match self {
            Self::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound => ExitCode::InputNotFound,
            Self::Read { .. } | Self::Malformed { .. } | Self::Apply(_) => ExitCode::BadData,
        }
    }
}

/// A text as tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Byte range of each token in the text.
    pub offsets: Vec<(usize, usize)>,
}

/// The tokenizer of a model folder.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// `bos_token` and the like, as templates see them.
    special_tokens: BTreeMap<String, String>,
    end_tokens: Vec<u32>,
    folder: PathBuf,
}

/// A JSON file of the folder; `None` where it is absent.
pub fn read_json(path: &Path) -> Result<Option<Value>, Error> {
    match std::fs::read_to_string(path) {
        Ok(text) => serde_json::from_str(&text)
            .map(Some)
            .map_err(|error| Error::Malformed { path: path.into(), message: format!("not valid JSON ({error})") }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Read { path: path.into(), source }),
    }
}

impl Tokenizer {
    /// Loads `tokenizer.json` and the special tokens that the files beside it name.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let path = folder.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
        // The tokenizers crate has panicked on damaged files; that is bad data, not a bug of ours.
        let inner = std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(&bytes))
            .map_err(|_| "not a valid tokenizer (its parser gave up)".to_owned())
            .and_then(|parsed| parsed.map_err(|error| format!("not a valid tokenizer ({error})")))
            .map_err(|message| Error::Malformed { path, message })?;
        let mut special_tokens = BTreeMap::new();
        for file in ["special_tokens_map.json", "tokenizer_config.json"] {
            let Some(Value::Object(entries)) = read_json(&folder.join(file))? else { continue };
            for (key, value) in entries {
                // A token is a string, or an object that describes an added token.
                let text = value.as_str().or_else(|| value.get("content")?.as_str());
                if let Some(text) = text.filter(|_| key.ends_with("_token")) {
                    special_tokens.insert(key, text.to_owned());
                }
            }
        }
        let mut end_tokens = Vec::new();
        for file in ["generation_config.json", "config.json"] {
            let Some(config) = read_json(&folder.join(file))? else { continue };
            match config.get("eos_token_id") {
                Some(Value::Number(id)) => end_tokens.extend(id.as_u64().map(|id| id as u32)),
                Some(Value::Array(ids)) => end_tokens.extend(ids.iter().filter_map(Value::as_u64).map(|id| id as u32)),
                _ => {}
            }
        }
        end_tokens.extend(special_tokens.get("eos_token").and_then(|token| inner.token_to_id(token)));
        end_tokens.sort_unstable();
        end_tokens.dedup();
        if end_tokens.is_empty() {
            return Err(Error::Malformed {
                path: folder.join("tokenizer_config.json"),
                message: "no eos_token here and no eos_token_id in config.json: the model could never end an answer"
                    .into(),
            });
        }
        Ok(Self { inner, special_tokens, end_tokens, folder: folder.into() })
    }

    /// Tokens of `text` with byte offsets; no special token is added, those written in the text are recognised.
    pub fn encode(&self, text: &str) -> Result<Encoded, Error> {
        let encoding = self.inner.encode(text, false).map_err(|error| Error::Apply(error.to_string()))?;
        Ok(Encoded { ids: encoding.get_ids().to_vec(), offsets: encoding.get_offsets().to_vec() })
    }

    /// The text of `ids`, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String, Error> {
        self.inner.decode(ids, true).map_err(|error| Error::Apply(error.to_string()))
    }

    /// The text of `ids`, special tokens included.
    pub fn decode_with_special(&self, ids: &[u32]) -> Result<String, Error> {
        self.inner.decode(ids, false).map_err(|error| Error::Apply(error.to_string()))
    }

    /// `bos_token`, `eos_token` and so on.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special_tokens
    }

    /// Ids that end an answer.
    pub fn end_tokens(&self) -> &[u32] {
        &self.end_tokens
    }

    /// Id of the token that is appended where a format has no end of its own.
    pub fn eos(&self) -> u32 {
        self.special_tokens
            .get("eos_token")
            .and_then(|token| self.inner.token_to_id(token))
            .unwrap_or_else(|| self.end_tokens[0])
    }

    /// Id of `bos_token`, if there is one.
    pub fn bos(&self) -> Option<u32> {
        self.inner.token_to_id(self.special_tokens.get("bos_token")?)
    }

    /// Texts that are tokens of their own, such as `<|im_end|>`.
    pub fn special_texts(&self) -> Vec<String> {
        let added = self.inner.get_added_tokens_decoder();
        added.values().filter(|token| token.special).map(|token| token.content.clone()).collect()
    }

    /// The model's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}
