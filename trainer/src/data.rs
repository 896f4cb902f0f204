//! From files of rows to tokens: formats, chat templates, answer masks, checks, order, packing. No tensor here.

pub mod example;
pub mod generation;
pub mod order;
pub mod pack;
