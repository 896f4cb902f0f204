//! What every room needs: requests to stop, randomness, numbers for people.

pub mod crashed;
pub mod random;
pub mod stop;
pub mod units;
