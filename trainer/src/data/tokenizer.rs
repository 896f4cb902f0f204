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
    /// The tokenizer has tokens that the model has no row for.
    #[error(
        "the tokenizer gives token id {id} ({token:?}), config.json says vocab_size {vocab_size}: tokenizer and model do not \
         belong together; take both from the same model"
    )]
    Vocabulary {
        /// The token.
        id: u32,
        /// Its text.
        token: String,
        /// Rows of the model's embedding.
        vocab_size: u64,
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
            Self::Read { .. } | Self::Malformed { .. } | Self::Vocabulary { .. } | Self::Apply(_) => ExitCode::BadData,
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
    /// The first token of every text that no template has written, if there is one.
    added_bos: Option<u32>,
    /// Rows of the model's embedding, where config.json says it.
    vocab_size: Option<u64>,
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
        let mut inner = std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(&bytes))
            .map_err(|_| "not a valid tokenizer (its parser gave up)".to_owned())
            .and_then(|parsed| parsed.map_err(|error| format!("not a valid tokenizer ({error})")))
            .map_err(|message| Error::Malformed { path, message })?;
        // Settings of whoever saved the file last: they would cut answers off without a word.
        let _ = inner.with_truncation(None);
        inner.with_padding(None);
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
        let mut vocab_size = None;
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        for file in ["generation_config.json", "config.json"] {
            let Some(config) = read_json(&folder.join(file))? else { continue };
            match config.get("eos_token_id") {
                Some(Value::Array(ids)) => end_tokens.extend(ids.iter().filter_map(id)),
                Some(value) => end_tokens.extend(id(value)),
                None => {}
            }
            vocab_size = config.get("vocab_size").and_then(Value::as_u64).or(vocab_size);
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
        let bos = special_tokens.get("bos_token").and_then(|token| inner.token_to_id(token));
        let processed = inner.encode("a", true).map_err(|error| Error::Apply(error.to_string()))?;
        let added_bos = bos.filter(|bos| processed.get_ids().first() == Some(bos));
        let tokenizer = Self { inner, special_tokens, end_tokens, added_bos, vocab_size, folder: folder.into() };
        tokenizer.check_vocabulary(&[tokenizer.eos()])?;
        Ok(tokenizer)
    }

    fn check_vocabulary(&self, ids: &[u32]) -> Result<(), Error> {
        let (Some(vocab_size), Some(&id)) = (self.vocab_size, ids.iter().max()) else { return Ok(()) };
        if u64::from(id) < vocab_size {
            return Ok(());
        }
        Err(Error::Vocabulary { id, token: self.inner.id_to_token(id).unwrap_or_default(), vocab_size })
    }

    /// Tokens of `text` with byte offsets; no special token is added, those written in the text are recognised.
    pub fn encode(&self, text: &str) -> Result<Encoded, Error> {
        let encoding = self.inner.encode(text, false).map_err(|error| Error::Apply(error.to_string()))?;
        self.check_vocabulary(encoding.get_ids())?;
        Ok(Encoded { ids: encoding.get_ids().to_vec(), offsets: encoding.get_offsets().to_vec() })
    }

    /// As [`Self::encode`], for a text that no template has written: it begins with the token that the tokenizer begins
    /// every text with, if there is one.
    pub fn encode_plain(&self, text: &str) -> Result<Encoded, Error> {
        let mut encoded = self.encode(text)?;
        if let Some(bos) = self.added_bos.filter(|bos| encoded.ids.first() != Some(bos)) {
            encoded.ids.insert(0, bos);
            encoded.offsets.insert(0, (0, 0));
        }
        Ok(encoded)
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

    /// The token that the tokenizer begins every text with, unless a template writes the text.
    pub fn added_bos(&self) -> Option<u32> {
        self.added_bos
    }

    /// Texts that are tokens of their own, such as `<|im_end|>`.
    pub fn special_texts(&self) -> Vec<String> {
        let added = self.inner.get_added_tokens_decoder();
        added
            .values()
            .filter(|token| token.special && !token.content.is_empty())
            .map(|token| token.content.clone())
            .collect()
    }

    /// The model's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}
