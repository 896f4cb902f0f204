//! The integration tests of the whole product, in one binary.

mod architecture;
mod attention;
mod bad_input;
mod chart;
mod chat_templates;
mod cluster;
mod command_line;
mod cuda;
mod hub;
mod images;
mod kstatus;
mod numerics;
mod observed;
mod operator;
mod optimizer;
mod processors;
mod resume;
mod rights;
mod run;
mod schedules;
mod served;
mod simulated;
mod stages;
mod validation;
