//! Control messages to workers.

use super::wire::Wire;
use super::{Encoding, Error, encode};
use crate::id::Pid;
use crate::select::Select;
use crate::state::Desired;

/// A message to workers: to one by its control queue, or to all by the broadcast exchange.
#[derive(Clone, Debug, PartialEq)]
pub enum Control {
    /// Read the desired state of these processes from their rows, and obey it. The message carries no decision itself.
    Obey {
        /// The requested `pause`, `play` or `kill`, for the log.
        verb: Desired,
        /// The processes.
        select: Select,
        /// The operator's reason.
        reason: Option<String>,
    },
    /// Read from the database whether the fleet is paused.
    Fleet {
        /// The requested `pause` or `play`, for the log.
        verb: Desired,
        /// The operator's reason.
        reason: Option<String>,
    },
    /// Report what this process is doing.
    Status(Pid),
    /// Send the output of this process from these offsets.
    Output {
        /// The process.
        pid: Pid,
        /// Offset of the first byte of standard output to send.
        stdout_offset: u64,
        /// Offset of the first byte of standard error to send.
        stderr_offset: u64,
    },
    /// Reply, to show that the worker is alive.
    Ping,
    /// Take no more processes, give back the held ones, and stop.
    Drain,
}

impl Control {
    /// The `type` property and field.
    pub fn word(&self) -> &'static str {
        match self {
            Control::Obey { verb, .. } | Control::Fleet { verb, .. } => verb.verb(),
            Control::Status(_) => "status",
            Control::Output { .. } => "output",
            Control::Ping => "ping",
            Control::Drain => "drain",
        }
    }

    /// Encodes the message body.
    pub fn encode(&self, encoding: Encoding) -> Vec<u8> {
        let base = Wire::new(self.word());
        let wire = match self.clone() {
            Control::Obey { select, reason, .. } => Wire { select: Some(select), reason, ..base },
            Control::Fleet { reason, .. } => Wire { fleet: Some(true), reason, ..base },
            Control::Status(pid) => Wire { pid: Some(pid), ..base },
            Control::Output { pid, stdout_offset, stderr_offset } => {
                Wire { pid: Some(pid), stdout_offset: Some(stdout_offset), stderr_offset: Some(stderr_offset), ..base }
            }
            Control::Ping | Control::Drain => base,
        };
        encode(&wire, encoding)
    }

    /// Decodes a message body.
    ///
    /// # Errors
    /// The reason why the message is unusable.
    pub fn decode(body: &[u8], encoding: Encoding) -> Result<Self, Error> {
        let wire = Wire::decode(body, encoding)?;
        match wire.kind.as_str() {
            "pause" => request(wire, Desired::Pause),
            "play" => request(wire, Desired::Run),
            "kill" => request(wire, Desired::Kill),
            "status" => Ok(Control::Status(wire.pid.ok_or(Error::Missing("pid"))?)),
            "output" => Ok(Control::Output {
                pid: wire.pid.ok_or(Error::Missing("pid"))?,
                stdout_offset: wire.stdout_offset.unwrap_or(0),
                stderr_offset: wire.stderr_offset.unwrap_or(0),
            }),
            "ping" => Ok(Control::Ping),
            "drain" => Ok(Control::Drain),
            _ => Err(Error::UnknownType(wire.kind)),
        }
    }
}

/// Reads a pause, play or kill: of the fleet, of a selection, or of one process.
fn request(wire: Wire, verb: Desired) -> Result<Control, Error> {
    let select = match (wire.select, wire.pid, wire.fleet) {
        (None, None, Some(true)) if verb != Desired::Kill => {
            return Ok(Control::Fleet { verb, reason: wire.reason });
        }
        (Some(select), None, None | Some(false)) => select,
        (None, Some(pid), None | Some(false)) => Select::one(pid),
        (Some(_), Some(_), _) => return Err(Error::Both("pid", "select")),
        (_, _, Some(true)) => return Err(Error::Both("fleet", "pid, select and kill")),
        (None, None, None | Some(false)) => return Err(Error::Missing("select")),
    };
    select.check().map_err(Error::Select)?;
    Ok(Control::Obey { verb, select, reason: wire.reason })
}

#[cfg(test)]
mod tests {
    use super::super::ENCODINGS;
    use super::*;

    #[test]
    fn control_messages_round_trip_in_both_encodings() {
        let pid = Pid::generate();
        let controls = [
            Control::Obey { verb: Desired::Kill, select: Select::default(), reason: Some("x".into()) },
            Control::Fleet { verb: Desired::Pause, reason: None },
            Control::Status(pid),
            Control::Output { pid, stdout_offset: 3, stderr_offset: 4 },
            Control::Ping,
            Control::Drain,
        ];
        for encoding in ENCODINGS {
            for control in &controls {
                assert_eq!(Control::decode(&control.encode(encoding), encoding).unwrap(), *control);
            }
        }
    }

    #[test]
    fn a_request_that_has_lost_its_target_reaches_no_process() {
        let pid = Pid::generate();
        for body in [
            r#"{"version": 1, "type": "kill", "select": []}"#.to_owned(),
            r#"{"version": 1, "type": "kill", "select": null}"#.to_owned(),
            r#"{"version": 1, "type": "kill", "select": {}, "pid": null}"#.to_owned(),
            r#"{"version": 1, "type": "kill", "select": {"pids": null}}"#.to_owned(),
            format!(r#"{{"version": 1, "type": "kill", "select": {{}}, "pid": "{pid}"}}"#),
            r#"{"version": 1, "type": "pause", "select": {}, "fleet": null}"#.to_owned(),
            r#"[1, "kill", null, null, null, null, {}]"#.to_owned(),
        ] {
            assert!(Control::decode(body.as_bytes(), Encoding::Json).is_err(), "{body}");
        }
        let body = br#"{"version": 1, "type": "kill", "select": {"pids": []}}"#;
        let control = Control::decode(body, Encoding::Json).unwrap();
        assert!(matches!(control, Control::Obey { select, .. } if select.is_none()));
    }

    #[test]
    fn an_empty_selection_pauses_every_process() {
        let body = br#"{"version": 1, "type": "pause", "select": {}, "reason": "maintenance"}"#;
        let control = Control::decode(body, Encoding::Json).unwrap();
        assert_eq!(
            control,
            Control::Obey { verb: Desired::Pause, select: Select::default(), reason: Some("maintenance".into()) }
        );
    }
}
