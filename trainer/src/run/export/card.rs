//! The model card: what the result is, how good it is, how to load it.

use crds::report::{Report, Scores};
use crds::run::{OutputFormat, RunConfig};

use crate::tell::display::fewer_rows;

/// The card as Markdown with the front matter that the hub reads.
pub fn model_card(config: &RunConfig, report: &Report) -> String {
    let base = config.model.uri.trim_start_matches("hf://").trim_start_matches("file://");
    let on_hub = config.model.uri.starts_with("hf://");
    let adapter = config.output.format == OutputFormat::Adapter;
    let mut card = String::from("---\n");
    if on_hub {
        card += &format!("base_model: {base}\nbase_model_relation: {}\n", if adapter { "adapter" } else { "finetune" });
    }
    card +=
        &format!("library_name: {}\npipeline_tag: text-generation\n", if adapter { "peft" } else { "transformers" });
    if adapter {
        let tag = if on_hub { format!("- base_model:adapter:{base}\n") } else { String::new() };
        card += &format!("tags:\n{tag}- lora\n- transformers\n");
    }
    card += &format!("---\n\n# {}\n\n", config.job.name);
    card += &format!("Fine-tuned from `{base}`.\n\n");
    if let Some(validation) = &report.validation {
        card += &format!("{}\n\n{}\n", validation.summary, results(report));
    }
    card += "![training and validation loss](loss.svg)\n\n## Use\n\n";
    card += &if adapter {
        format!(
            "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
             model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(\"{base}\"), \".\")\n\
             tokenizer = AutoTokenizer.from_pretrained(\".\")\n```\n"
        )
    } else {
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n\
         model = AutoModelForCausalLM.from_pretrained(\".\")\ntokenizer = AutoTokenizer.from_pretrained(\".\")\n```\n"
            .to_owned()
    };
    if let Some(rank) = report.artifact.as_ref().and_then(|artifact| artifact.lora_rank).filter(|rank| *rank > 16) {
        card += &format!("\nvLLM loads adapters up to rank 16 unless it is started with `--max-lora-rank {rank}`.\n");
    }
    card += "\n## Training\n\n";
    card += &format!("```json\n{}\n```\n", serde_json::to_string_pretty(&config.hyperparameters).expect("JSON"));
    card
}

fn results(report: &Report) -> String {
    let Some(validation) = &report.validation else { return String::new() };
    let few_shot = format!("base, {} examples", validation.few_shot_examples.unwrap_or(0));
    let columns: Vec<(String, Scores)> = [
        Some(("tuned".to_owned(), validation.tuned)),
        validation.zero_shot.map(|scores| ("base".to_owned(), scores)),
        validation.few_shot.map(|scores| (few_shot.clone(), scores)),
    ]
    .into_iter()
    .flatten()
    .collect();
    let mut table = String::from("| metric |");
    for (name, _) in &columns {
        table += &format!(" {name} |");
    }
    table += &format!("\n|---|{}\n", "---|".repeat(columns.len()));
    let rows: [(&str, fn(&Scores) -> Option<f64>); 4] = [
        ("exact match", |scores| scores.exact_match),
        ("validation loss", |scores| scores.eval_loss),
        ("perplexity", |scores| scores.perplexity),
        ("token accuracy", |scores| scores.token_accuracy),
    ];
    for (name, value) in rows {
        if columns.iter().any(|(_, scores)| value(scores).is_some()) {
            let cells: Vec<String> =
                columns.iter().map(|(_, scores)| value(scores).map_or("–".to_owned(), |v| format!("{v:.3}"))).collect();
            table += &format!("| {name} | {} |\n", cells.join(" | "));
        }
    }
    match fewer_rows(validation, &format!("\"{few_shot}\"")) {
        Some(text) => format!("{table}\n{} unseen rows; {text}.\n\n", validation.rows),
        None => format!("{table}\n{} unseen rows.\n\n", validation.rows),
    }
}
