//! The integration tests of the whole product, in one binary.

mod bad_input;
mod chat_templates;
mod numerics;
mod resume;
mod validation;
