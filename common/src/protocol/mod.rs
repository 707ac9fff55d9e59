//! The protocol's two machines: pure, events in, commands out, without floats, clocks or sockets.

pub mod coordinator;
pub mod worker;

pub use coordinator::{Command, Event, Kind, Machine, Patience, Reason, shares};
