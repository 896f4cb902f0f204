//! The keys of a `config.json`. Each is read by name; one that nobody reads and that is not known to change nothing is refused, so
//! that no model is computed as something that it is not.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// Keys that change nothing about what is computed: names, dtypes of storage, tokens that the tokenizer's files have as well, what
/// transformers writes of itself, how answers are drawn, and what only starts a training from nothing.
const WITHOUT_EFFECT: [&str; 66] = [
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "model_type",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
];

/// A `config.json` that is being read.
#[derive(Debug)]
pub struct Keys {
    map: Map<String, Value>,
    read: RefCell<BTreeSet<String>>,
}

impl Keys {
    /// An object with any keys.
    pub fn parse(text: &str) -> Result<Self, serde_json::Error> {
        Ok(Self { map: serde_json::from_str(text)?, read: RefCell::default() })
    }

    /// What a key holds; absent and null are the same.
    pub fn get<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, String> {
        self.read.borrow_mut().insert(name.to_owned());
        match self.map.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                let read = serde_json::from_value(value.clone());
                read.map(Some).map_err(|error| format!("{name} is {value}: {error}"))
            }
        }
    }

    /// What a key holds, or what transformers takes where it is absent.
    pub fn or<T: DeserializeOwned>(&self, name: &str, default: T) -> Result<T, String> {
        Ok(self.get(name)?.unwrap_or(default))
    }

    /// What a key holds that every model of the family has.
    pub fn required<T: DeserializeOwned>(&self, name: &str) -> Result<T, String> {
        self.get(name)?.ok_or_else(|| format!("{name} is missing"))
    }

    /// A key that has to be absent or to hold one value, because nothing else is computed.
    pub fn only(&self, name: &str, expected: &Value) -> Result<(), String> {
        let found: Option<Value> = self.get(name)?;
        let is_number = |value: &Value| value.as_f64();
        match found {
            Some(found)
                if found != *expected && (is_number(&found).is_none() || is_number(&found) != is_number(expected)) =>
            {
                Err(format!("not supported yet: {name}: {found}; expected {expected}"))
            }
            _ => Ok(()),
        }
    }

    /// Refuses keys that nobody read.
    pub fn finish(&self) -> Result<(), String> {
        let read = self.read.borrow();
        let unread = |name: &&String| !read.contains(*name) && !WITHOUT_EFFECT.contains(&name.as_str());
        // A key without a value says nothing.
        let said = self.map.iter().filter(|(_, value)| !value.is_null()).map(|(name, _)| name);
        let mut unread: Vec<&str> = said.filter(unread).map(String::as_str).collect();
        unread.sort_unstable();
        if unread.is_empty() {
            return Ok(());
        }
        Err(format!("not supported yet: {}; what that changes is not known here", unread.join(", ")))
    }
}
