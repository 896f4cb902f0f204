//! What is read of a `config.json`, and what is refused.

use serde_json::{Value, json};

use super::*;

/// Reads a config.json that is right but for `changes`.
fn read(changes: &Value) -> Result<Spec, String> {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5
    });
    for (name, value) in changes.as_object().expect("changes by name") {
        config[name] = value.clone();
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("config.json"), config.to_string()).expect("writable");
    Spec::read(folder.path()).map_err(|error| error.to_string().replace(&format!("{}/", folder.path().display()), ""))
}

#[test]
fn odd_numbers_are_refused_and_never_panic() {
    for (changes, expected) in [
        (json!({"num_attention_heads": 0}), "num_attention_heads is 0; expected a number between 1 and 65536"),
        (json!({"num_attention_heads": -1, "hidden_size": i64::MIN}), "num_attention_heads is -1"),
        (json!({"num_key_value_heads": 0}), "num_key_value_heads is 0"),
        (
            json!({"num_hidden_layers": 16_000_000}),
            "num_hidden_layers is 16000000; expected a number between 1 and 4096",
        ),
        (json!({"pad_token_id": 256}), "pad_token_id is 256, beyond the vocabulary of 256 tokens (vocab_size)"),
        (json!({"rms_norm_eps": -1.0}), "rms_norm_eps is -1"),
        (json!({"rope_theta": 0.0}), "rope_theta is 0"),
        (
            json!({"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}}),
            "rope_scaling has rope_type llama3 and type linear; expected the same, or one of them",
        ),
        (
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
            "rope_scaling.high_freq_factor is 4; expected more than low_freq_factor, 4",
        ),
    ] {
        let error = read(&changes).expect_err(expected);
        assert!(error.starts_with(&format!("config.json: {expected}")), "{error}");
    }
}

#[test]
fn a_negative_pad_token_is_none_and_both_names_of_the_rope_type_are_accepted() {
    assert_eq!(read(&json!({"pad_token_id": -1})).expect("valid").pad_token_id, None);
    assert_eq!(read(&json!({"pad_token_id": 255})).expect("valid").pad_token_id, Some(255));
    let scaled = |names: Value| {
        let mut scaling = names;
        scaling["factor"] = json!(2.0);
        read(&json!({"rope_scaling": scaling})).expect("valid").rope_frequencies
    };
    let linear = scaled(json!({"rope_type": "linear"}));
    assert_eq!(scaled(json!({"type": "linear"})), linear);
    assert_eq!(scaled(json!({"type": "linear", "rope_type": "linear"})), linear);
}

/// A file of each family that is right but for `changes`.
fn read_as(architecture: &str, model_type: &str, changes: &Value) -> Result<Spec, String> {
    let mut all = json!({"architectures": [architecture], "model_type": model_type});
    all.as_object_mut().expect("a map").extend(changes.as_object().expect("a map").clone());
    read(&all)
}

/// A key that changes what is computed must not be passed over, and neither must one that nobody knows.
#[test]
fn keys_that_nobody_reads_are_refused_by_name() {
    for (changes, expected) in [
        (json!({"attention_dropout": 0.1}), "not supported yet: attention_dropout: 0.1; expected 0.0"),
        (json!({"partial_rotary_factor": 0.5}), "not supported yet: partial_rotary_factor: 0.5; expected 1.0"),
        (json!({"rope_interleaved": true}), "not supported yet: rope_interleaved: true; expected false"),
        (json!({"hidden_act": "gelu"}), "not supported yet: hidden_act: \"gelu\"; expected \"silu\""),
        (json!({"final_logit_softcapping": 30.0}), "not supported yet: final_logit_softcapping; what that changes"),
        (json!({"zeta": 1, "alpha": 2}), "not supported yet: alpha, zeta; what that changes is not known here"),
        (json!({"embedding_multiplier": 12.0}), "not supported yet: embedding_multiplier; what that changes"),
        (
            json!({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}}),
            "not supported yet: rope_scaling.beta_fast with rope_type linear",
        ),
        (json!({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}), "not supported yet: rope_type yarn; expected"),
        (json!({"quantization_config": {"quant_method": "gptq"}}), "the weights are quantised"),
        (json!({"vocab_size": "many"}), "vocab_size is \"many\": invalid type"),
    ] {
        let error = read(&changes).expect_err(expected);
        assert!(error.starts_with(&format!("config.json: {expected}")), "{error}");
    }
    let harmless = json!({
        "attention_dropout": 0, "rope_interleaved": false, "torch_dtype": "bfloat16", "use_cache": true, "pretraining_tp": 1,
        "head_dim": null, "unknown": null,
    });
    assert_eq!(read(&harmless), read(&json!({})));
}

#[test]
fn what_is_no_decoder_of_a_known_family_is_refused_with_what_is_missing() {
    for (architecture, model_type, expected) in [
        (
            "GPT2LMHeadModel",
            "gpt2",
            "architecture GPT2LMHeadModel (model_type gpt2); expected one of GemmaForCausalLM, ",
        ),
        ("GptOssForCausalLM", "gpt_oss", "(model_type gpt_oss), which needs attention sinks"),
        ("LlamaForCausalLM", "qwen2", "architecture LlamaForCausalLM (model_type qwen2); expected one of"),
    ] {
        let error = read_as(architecture, model_type, &json!({})).expect_err("not known");
        assert!(error.starts_with("config.json: not supported yet: ") && error.contains(expected), "{error}");
    }
}

#[test]
fn a_family_says_what_its_layers_are() {
    let qwen2 =
        read_as("Qwen2ForCausalLM", "qwen2", &json!({"num_key_value_heads": 2, "sliding_window": 16})).expect("valid");
    let names: Vec<String> = qwen2.tensors().into_iter().map(|(name, _)| name).collect();
    assert!(names.contains(&"model.layers.1.self_attn.v_proj.bias".to_owned()) && qwen2.window().is_none());
    assert!(!names.contains(&"model.layers.1.self_attn.o_proj.bias".to_owned()));
    let windows =
        json!({"num_key_value_heads": 2, "sliding_window": 16, "use_sliding_window": true, "max_window_layers": 1});
    let qwen2 = read_as("Qwen2ForCausalLM", "qwen2", &windows).expect("valid");
    let windows: Vec<_> = qwen2.layers.iter().map(|layer| layer.attention.window).collect();
    assert_eq!((windows, qwen2.longest()), (vec![None, Some(16)], 16));
    let smollm3 = read_as("SmolLM3ForCausalLM", "smollm3", &json!({"num_hidden_layers": 8})).expect("valid");
    let rotary: Vec<bool> = smollm3.layers.iter().map(|layer| layer.attention.is_rotary).collect();
    assert_eq!(rotary, [true, true, true, false, true, true, true, false]);
    let mistral = read_as("MistralForCausalLM", "mistral", &json!({"num_key_value_heads": 2, "sliding_window": 0}));
    assert!(mistral.expect_err("no window").contains("sliding_window is 0; expected at least 1, or null"));
    let gemma = json!({"num_key_value_heads": 1, "head_dim": 16, "hidden_act": "gelu"});
    let gemma = read_as("GemmaForCausalLM", "gemma", &gemma).expect("valid");
    assert!(gemma.norm.is_offset && gemma.tie_word_embeddings);
    let olmo2 = read_as("Olmo2ForCausalLM", "olmo2", &json!({})).expect("valid");
    let tensors = olmo2.tensors();
    let shape = |name: &str| tensors.iter().find(|(found, _)| found == name).map(|(_, shape)| shape.clone());
    assert_eq!(shape("model.layers.0.self_attn.q_norm.weight"), Some(vec![64]));
    assert_eq!(shape("model.layers.0.input_layernorm.weight"), None);
}

/// What the hub's files of these models say, but for the lists of layers; none of their keys may stand in the way.
#[test]
fn files_of_released_models_are_read() {
    let common = json!({
        "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": [2, 3], "hidden_act": "silu", "initializer_range": 0.02,
        "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16", "transformers_version": "4.53.0", "use_cache": true,
    });
    let llama3 = json!({"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                        "original_max_position_embeddings": 8192, "rope_type": "llama3"});
    for (architecture, model_type, own, parameters) in [
        (
            "LlamaForCausalLM",
            "llama",
            json!({
                "attention_bias": false, "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
                "max_position_embeddings": 131_072, "mlp_bias": false, "num_attention_heads": 32, "num_hidden_layers": 16,
                "num_key_value_heads": 8, "pretraining_tp": 1, "rope_scaling": llama3, "rope_theta": 500_000.0,
                "tie_word_embeddings": true, "vocab_size": 128_256, "unsloth_version": "2025.1",
            }),
            1_235_814_400,
        ),
        (
            "Qwen2ForCausalLM",
            "qwen2",
            json!({
                "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32_768, "max_window_layers": 21,
                "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rope_theta": 1_000_000.0,
                "sliding_window": 32_768, "tie_word_embeddings": true, "use_mrope": false, "use_sliding_window": false,
                "vocab_size": 151_936,
            }),
            494_032_768,
        ),
        (
            "Qwen3ForCausalLM",
            "qwen3",
            json!({
                "attention_bias": false, "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072,
                "max_position_embeddings": 40_960, "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28,
                "num_key_value_heads": 8, "rope_scaling": null, "rope_theta": 1_000_000, "sliding_window": null,
                "tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151_936,
            }),
            596_049_920,
        ),
        (
            "SmolLM3ForCausalLM",
            "smollm3",
            json!({
                "attention_bias": false, "hidden_size": 2048, "intermediate_size": 11_008, "max_position_embeddings": 65_536,
                "max_window_layers": 28, "mlp_bias": false, "no_rope_layer_interval": 4, "num_attention_heads": 16,
                "num_hidden_layers": 36, "num_key_value_heads": 4, "pad_token_id": 128_004, "pretraining_tp": 2,
                "rope_scaling": null, "rope_theta": 5_000_000.0, "sliding_window": null, "use_sliding_window": false,
                "vocab_size": 128_256,
            }),
            3_075_098_624,
        ),
        (
            "GraniteForCausalLM",
            "granite",
            json!({
                "attention_bias": false, "attention_multiplier": 0.015_625, "embedding_multiplier": 12.0, "hidden_size": 2048,
                "intermediate_size": 8192, "logits_scaling": 8.0, "max_position_embeddings": 131_072, "mlp_bias": false,
                "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0,
                "residual_multiplier": 0.22, "rope_scaling": null, "rope_theta": 5_000_000.0, "tie_word_embeddings": true,
                "vocab_size": 49_155,
            }),
            2_533_531_648,
        ),
    ] {
        let mut all = common.clone();
        all.as_object_mut().expect("a map").extend(own.as_object().expect("a map").clone());
        let spec = read_as(architecture, model_type, &all).unwrap_or_else(|error| panic!("{architecture}: {error}"));
        // As model cards count them.
        assert_eq!(spec.elements(), parameters, "{architecture}");
    }
}
