//! Which outputs of a layer are wanted. Shapes as in [`super`].

use tch::Tensor;

use crate::compute::linear::InputMask;

/// The tokens that a layer's output is wanted for. After the last layer's attention, work for any but the labels' is dead.
#[derive(Clone, Copy)]
pub enum Outputs<'a> {
    /// All t.
    All,
    /// These of t, int64 `[r]`, each once.
    Rows(&'a Tensor),
}

impl Outputs<'_> {
    pub(super) fn select(self, x_th: &Tensor) -> Tensor {
        match self {
            Outputs::All => x_th.shallow_clone(),
            Outputs::Rows(rows_r) => x_th.index_select(0, rows_r),
        }
    }

    /// The gradient of all `tokens` from those that were selected.
    pub(super) fn scatter(self, gradient_rh: Tensor, tokens: i64) -> Tensor {
        match self {
            Outputs::All => gradient_rh,
            Outputs::Rows(rows_r) => {
                let full =
                    gradient_rh.new_zeros([tokens, gradient_rh.size()[1]], (gradient_rh.kind(), gradient_rh.device()));
                full.index_copy(0, rows_r, &gradient_rh)
            }
        }
    }
}

/// The rows of the masks that all tokens have: which outputs are wanted does not change the randomness.
pub(super) struct SelectedMask<'a> {
    pub all: &'a dyn InputMask,
    pub outputs: Outputs<'a>,
    pub tokens: i64,
}

impl InputMask for SelectedMask<'_> {
    fn mask(&self, site: u64, _rows: i64, x_ri: &Tensor) -> Option<Tensor> {
        self.all.mask(site, self.tokens, x_ri).map(|mask_ti| self.outputs.select(&mask_ti))
    }
}
