//! The integration tests of the whole product, in one binary.

mod architecture;
mod bad_input;
mod chat_templates;
mod command_line;
mod hub;
mod numerics;
mod resume;
mod run;
mod stages;
mod validation;
