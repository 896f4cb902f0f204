//! What an operation has to compute and to move, from its name and the shapes of its arguments.

use tch::Kind;

/// Dtype and shape of each tensor among the arguments.
pub(super) fn tensors(inputs: &str) -> Vec<(Kind, Vec<i64>)> {
    inputs
        .split(';')
        .filter_map(|input| {
            let mut words = input.split(' ');
            // Names of C++ types; two words in one of them.
            let kind = match words.next()? {
                "c10::BFloat16" => Kind::BFloat16,
                "c10::Half" => Kind::Half,
                "float" => Kind::Float,
                "double" => Kind::Double,
                "long" => Kind::Int64,
                "int" => Kind::Int,
                "bool" => Kind::Bool,
                _ => return None,
            };
            Some((kind, words.filter_map(|size| size.parse().ok()).collect()))
        })
        .collect()
}

fn numel(shape: &[i64]) -> f64 {
    shape.iter().map(|size| *size as f64).product()
}

/// Multiplications and additions of matrix products and attention.
pub(super) fn flops(name: &str, tensors: &[(Kind, Vec<i64>)]) -> f64 {
    let shape = |index: usize| tensors.get(index).map_or(&[][..], |(_, shape)| shape.as_slice());
    // `[…, m, k] x [k, n]`
    let product = |a: &[i64], b: &[i64]| numel(a) * 2.0 * b.last().map_or(0.0, |n| *n as f64);
    match name {
        "mm" | "bmm" => product(shape(0), shape(1)),
        "addmm" | "addmm_" | "baddbmm" => product(shape(1), shape(2)),
        "finetune::linear" => 2.0 * numel(shape(0)) * linear_outputs(tensors),
        // Query `[b, n, l, d]`: scores and values, the lower triangle only.
        "_scaled_dot_product_flash_attention_for_cpu" => attention_flops(shape(0)),
        // The same twice over for the gradients of both products, and the scores again.
        "_scaled_dot_product_flash_attention_for_cpu_backward" => 2.5 * attention_flops(shape(1)),
        // Query `[t, n, d]` and, after keys and values, where the examples begin and end.
        "_flash_attention_forward" => packed_attention_flops(shape(0), shape(3)),
        "_flash_attention_backward" => 2.5 * packed_attention_flops(shape(1), shape(6)),
        _ => 0.0,
    }
}

/// Outputs for each row of `[t, in]` from weights `[out, in]`.
fn linear_outputs(tensors: &[(Kind, Vec<i64>)]) -> f64 {
    tensors.iter().skip(1).filter_map(|(_, weight)| weight.first()).sum::<i64>() as f64
}

fn attention_flops(query: &[i64]) -> f64 {
    match *query {
        [batch, heads, length, size] => 2.0 * (batch * heads * length * length * size) as f64,
        _ => 0.0,
    }
}

/// Attention over packed examples `[t, n, d]` that begin and end at `[examples + 1]` places: what it is at least, which is where
/// all are of the same length.
fn packed_attention_flops(query: &[i64], places: &[i64]) -> f64 {
    match (query, places) {
        (&[length, heads, size], &[places]) if places > 1 => {
            2.0 * (heads * length * length * size) as f64 / (places - 1) as f64
        }
        _ => 0.0,
    }
}

/// Bytes that have to be moved: the inputs, and an output.
pub(super) fn bytes(name: &str, tensors: &[(Kind, Vec<i64>)]) -> f64 {
    // These only make a handle, or give memory that nobody has written yet.
    if [
        "view",
        "reshape",
        "transpose",
        "t",
        "expand",
        "narrow",
        "slice",
        "as_strided",
        "unsqueeze",
        "squeeze",
        "flatten",
        "empty",
        "empty_like",
        "empty_strided",
        "select",
        "detach",
        "alias",
        "matmul",
        "linear",
        "numpy_T",
        "resize_",
        "_unsafe_view",
        "unflatten",
        "permute",
    ]
    .contains(&name)
    {
        return 0.0;
    }
    let size = |(kind, shape): &(Kind, Vec<i64>)| kind.elt_size_in_bytes() as f64 * numel(shape);
    let inputs: f64 = tensors.iter().map(size).sum();
    let output = match (name, tensors) {
        ("mm", [(kind, a), (_, b), ..]) => {
            kind.elt_size_in_bytes() as f64 * numel(a) / a.last().map_or(1.0, |k| *k as f64)
                * b.last().map_or(1.0, |n| *n as f64)
        }
        ("finetune::linear", [(kind, x), ..]) => {
            (kind.elt_size_in_bytes() as i64 * x.first().unwrap_or(&0)) as f64 * linear_outputs(tensors)
        }
        // Lookups and reductions write less than they read.
        ("sum" | "mean" | "logsumexp" | "max" | "argmax" | "norm" | "gather" | "index_select", _) => 0.0,
        _ => tensors.iter().map(size).fold(0.0, f64::max),
    };
    inputs + output
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_of_few_rows_counts_what_libtorchs_would() {
        let (x, weight) = ((Kind::BFloat16, vec![3, 8]), (Kind::BFloat16, vec![5, 8]));
        let transposed = (Kind::BFloat16, vec![8, 5]);
        let (ours, theirs) = ([x.clone(), weight.clone()], [x.clone(), transposed]);
        assert_eq!((flops("finetune::linear", &ours), bytes("finetune::linear", &ours)), (240.0, 158.0));
        // Two with one input read it once.
        let both = [x, weight.clone(), weight];
        assert_eq!((flops("finetune::linear", &both), bytes("finetune::linear", &both)), (480.0, 268.0));
        assert_eq!((flops("mm", &theirs), bytes("mm", &theirs)), (240.0, 158.0));
    }

    #[test]
    fn attention_counts_the_lower_triangle() {
        let query = (Kind::BFloat16, vec![1, 2, 8, 4]);
        assert_eq!(flops("_scaled_dot_product_flash_attention_for_cpu", &[query]), f64::from(2 * 2 * 8 * 8 * 4));
    }

    #[test]
    fn attention_over_packed_examples_counts_each_by_itself() {
        let (q, k) = ((Kind::BFloat16, vec![8, 2, 4]), (Kind::BFloat16, vec![8, 1, 4]));
        let (logsumexp, places) = ((Kind::Float, vec![2, 8]), (Kind::Int, vec![3]));
        let forward = [q.clone(), k.clone(), k.clone(), places.clone(), places.clone()];
        // Two examples of 4 tokens.
        let each = f64::from(2 * 2 * 4 * 4 * 4);
        assert_eq!(flops("_flash_attention_forward", &forward), 2.0 * each);
        let backward = [q.clone(), q.clone(), k.clone(), k, q, logsumexp, places.clone(), places];
        assert_eq!(flops("_flash_attention_backward", &backward), 2.5 * 2.0 * each);
    }
}
