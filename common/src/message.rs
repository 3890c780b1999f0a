//! What travels over the broker: an envelope with a version, as MessagePack with named fields or as JSON.
//!
//! A reader ignores fields that it does not know, and every field but `version` and `type` may be absent, so old and
//! new programs read each other. What a reader cannot use is an [`Error`] with the reason that a person needs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::by_name::{self, by_name_only};
use crate::id::{Incarnation, Pid};
use crate::message_pack;
use crate::select::Select;
use crate::state::{Desired, State};

/// The version of the envelope that this program writes, and the newest that it reads.
pub const VERSION: u32 = 1;

/// Largest body that is published or read.
///
/// Messages carry ids; only a launch from outside carries a spec, and specs are bounded at 1 MiB. RabbitMQ 4 refuses
/// 16 MiB by default, and a refused publish takes every unconfirmed one on its channel with it.
pub const SIZE_BYTES_MAX: usize = 2 * 1024 * 1024;

/// How a body is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// MessagePack with named fields; what Baton itself writes.
    MessagePack,
    /// JSON; what people and scripts write.
    Json,
}

impl Encoding {
    /// The encoding that a `content_type` property names; MessagePack where it is absent or unknown.
    pub fn of_content_type(content_type: Option<&str>) -> Self {
        match content_type {
            Some(text) if text.to_ascii_lowercase().contains("json") => Encoding::Json,
            Some(_) | None => Encoding::MessagePack,
        }
    }

    /// The `content_type` property.
    pub fn content_type(self) -> &'static str {
        match self {
            Encoding::MessagePack => "application/msgpack",
            Encoding::Json => "application/json",
        }
    }
}

/// A message of the task queue.
#[derive(Clone, Debug, PartialEq)]
pub enum Task {
    /// A process to take up for the first time.
    Launch {
        /// The process.
        pid: Pid,
        /// Its spec, when the sender has not inserted the row itself.
        spec: Option<Value>,
        /// Answer a second time when the process has ended.
        wait: bool,
        /// When the row was told, in database time (microseconds since 1970); absent in messages from outside.
        announced_at: Option<i64>,
    },
    /// A process that can go on.
    Continue {
        /// The process.
        pid: Pid,
        /// As in [`Task::Launch`].
        announced_at: Option<i64>,
    },
}

impl Task {
    /// The process the message stands for.
    pub fn pid(&self) -> Pid {
        match self {
            Task::Launch { pid, .. } | Task::Continue { pid, .. } => *pid,
        }
    }

    /// When the row was told, if the sender was Baton.
    pub fn announced_at(&self) -> Option<i64> {
        match self {
            Task::Launch { announced_at, .. } | Task::Continue { announced_at, .. } => *announced_at,
        }
    }

    /// The `type` property and field.
    pub fn word(&self) -> &'static str {
        match self {
            Task::Launch { .. } => "launch",
            Task::Continue { .. } => "continue",
        }
    }

    /// The message's body.
    pub fn encode(&self, encoding: Encoding) -> Vec<u8> {
        let wire = match self.clone() {
            Task::Launch { pid, spec, wait, announced_at } => {
                Wire { pid: Some(pid), spec, wait: wait.then_some(true), announced_at, ..Wire::new("launch") }
            }
            Task::Continue { pid, announced_at } => Wire { pid: Some(pid), announced_at, ..Wire::new("continue") },
        };
        encode(&wire, encoding)
    }

    /// Reads a body.
    ///
    /// # Errors
    /// The reason why nobody can use it; the message belongs into the dead-letter queue.
    pub fn decode(body: &[u8], encoding: Encoding) -> Result<Self, Error> {
        let wire = Wire::decode(body, encoding)?;
        match wire.kind.as_str() {
            "launch" => Ok(Task::Launch {
                pid: wire.pid.ok_or(Error::Missing("pid"))?,
                spec: wire.spec,
                wait: wire.wait.unwrap_or(false),
                announced_at: wire.announced_at,
            }),
            "continue" => {
                Ok(Task::Continue { pid: wire.pid.ok_or(Error::Missing("pid"))?, announced_at: wire.announced_at })
            }
            _ => Err(Error::UnknownType(wire.kind)),
        }
    }
}

/// A message to workers: to one by its control queue, or to all by the broadcast exchange.
#[derive(Clone, Debug, PartialEq)]
pub enum Control {
    /// Read what is desired of these processes, and obey. Carries no decision: the row does.
    Obey {
        /// `pause`, `play` or `kill`: what was asked, for the log.
        verb: Desired,
        /// Which processes.
        select: Select,
        /// Why, in the operator's words.
        reason: Option<String>,
    },
    /// Read whether the fleet takes work.
    Fleet {
        /// `pause` or `play`: what was asked, for the log.
        verb: Desired,
        /// Why, in the operator's words.
        reason: Option<String>,
    },
    /// What does this process do right now?
    Status(Pid),
    /// What has this process written, from these offsets on?
    Output {
        /// The process.
        pid: Pid,
        /// First byte of standard output that is wanted.
        stdout_offset: u64,
        /// First byte of standard error that is wanted.
        stderr_offset: u64,
    },
    /// Are you there?
    Ping,
    /// Take nothing more, give back what is held, stop.
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

    /// The message's body.
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

    /// Reads a body.
    ///
    /// # Errors
    /// The reason why it cannot be used.
    pub fn decode(body: &[u8], encoding: Encoding) -> Result<Self, Error> {
        let wire = Wire::decode(body, encoding)?;
        let obey = |wire: Wire, verb| {
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
        };
        match wire.kind.as_str() {
            "pause" => obey(wire, Desired::Pause),
            "play" => obey(wire, Desired::Run),
            "kill" => obey(wire, Desired::Kill),
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

/// An answer to a launch or to a control message. Which fields are there follows from what was asked.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// The process it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<Pid>,
    /// To a launch: whether its row is committed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accepted: Option<bool>,
    /// The process's state, by its word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// The process's exit code, when it has ended with one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<i32>,
    /// What the process returned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub values: Option<Value>,
    /// To a control request: what it has come to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Effect>,
    /// To a broadcast: what it has come to, by the effect's word, and for how many of the answering worker's processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counts: Option<BTreeMap<String, u64>>,
    /// To a broadcast: the name of the worker that answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<String>,
    /// To a broadcast: its incarnation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<Incarnation>,
    /// To `status`: what the process does right now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
    /// To `output`: what the process has written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<OutputChunk>,
    /// To `ping`: what has gone over the worker's connections.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic: Option<Traffic>,
    /// Why nothing was done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What has gone over a program's connections to the broker since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Tasks that were published and confirmed.
    pub told: u64,
    /// The bodies of these, in bytes.
    pub told_bytes: u64,
    /// Tasks that arrived.
    pub delivered: u64,
    /// Frames that acknowledged them; one can stand for many.
    pub ack_frames: u64,
    /// Messages about changes of state; one can stand for many changes.
    pub event_messages: u64,
    /// Answers to launches and requests.
    pub replies: u64,
}

/// What a control request has come to. On the wire it is its word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effect {
    /// It is paused now.
    Paused,
    /// It will be before its next advance; its holder knows.
    Pausing,
    /// It was paused before.
    AlreadyPaused,
    /// It goes on where it was.
    Playing,
    /// Nobody had paused it.
    AlreadyRunning,
    /// It has ended by this or an earlier kill.
    Killed,
    /// Its holder is ending what it runs.
    Killing,
    /// It had come to its end by itself before.
    Finished,
    /// It had failed before.
    Excepted,
    /// A later request wants something else.
    Superseded,
    /// No such process.
    Absent,
    /// The worker that was asked does not hold it.
    NotHeld,
    /// It has not begun to run anything.
    NotStarted,
    /// A ping's answer.
    Alive,
    /// The worker gives back what it holds and stops.
    Draining,
    /// What was asked of many is written into their rows.
    Recorded,
    /// A word of a newer Baton.
    Unknown,
}

impl Effect {
    const ALL: [Effect; 16] = [
        Effect::Paused,
        Effect::Pausing,
        Effect::AlreadyPaused,
        Effect::Playing,
        Effect::AlreadyRunning,
        Effect::Killed,
        Effect::Killing,
        Effect::Finished,
        Effect::Excepted,
        Effect::Superseded,
        Effect::Absent,
        Effect::NotHeld,
        Effect::NotStarted,
        Effect::Alive,
        Effect::Draining,
        Effect::Recorded,
    ];

    /// The word on the wire and in tables.
    pub fn word(self) -> &'static str {
        match self {
            Effect::Paused => "paused",
            Effect::Pausing => "pausing",
            Effect::AlreadyPaused => "already_paused",
            Effect::Playing => "playing",
            Effect::AlreadyRunning => "already_running",
            Effect::Killed => "killed",
            Effect::Killing => "killing",
            Effect::Finished => "finished",
            Effect::Excepted => "excepted",
            Effect::Superseded => "superseded",
            Effect::Absent => "absent",
            Effect::NotHeld => "not_held",
            Effect::NotStarted => "not_started",
            Effect::Alive => "alive",
            Effect::Draining => "draining",
            Effect::Recorded => "recorded",
            Effect::Unknown => "unknown",
        }
    }

    /// What a request comes to that its holder has yet to obey.
    pub fn pending(verb: Desired) -> Self {
        match verb {
            Desired::Run => Effect::Playing,
            Desired::Pause => Effect::Pausing,
            Desired::Kill => Effect::Killing,
        }
    }

    /// What a request comes to that is obeyed.
    pub fn applied(verb: Desired) -> Self {
        match verb {
            Desired::Run => Effect::Playing,
            Desired::Pause => Effect::Paused,
            Desired::Kill => Effect::Killed,
        }
    }

    /// What a request comes to whose process has ended in this state.
    pub fn ended(state: State) -> Self {
        match state {
            State::Finished => Effect::Finished,
            State::Excepted => Effect::Excepted,
            State::Killed => Effect::Killed,
            State::Created | State::Running | State::Waiting | State::Paused(_) => Effect::Unknown,
        }
    }
}

impl Serialize for Effect {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.word())
    }
}

impl<'de> Deserialize<'de> for Effect {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let word = String::deserialize(deserializer)?;
        Ok(Effect::ALL.into_iter().find(|effect| effect.word() == word).unwrap_or(Effect::Unknown))
    }
}

/// What a held process does right now.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Where it is within its life: `advancing`, `submit`, `monitor`…
    pub stage: String,
    /// Milliseconds since it entered that stage.
    pub stage_ms: u64,
    /// How many advances are committed.
    pub advances: u64,
    /// The worker's name.
    pub worker: String,
    /// The number of the lease.
    pub epoch: i64,
    /// Its last line of output or log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_line: Option<String>,
    /// The operating system's pid of its program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub child: Option<u32>,
    /// Memory of its program and of what that started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// For how long it has blocked its thread, if it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocked_ms: Option<u64>,
}

/// A piece of a running program's output.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OutputChunk {
    /// Bytes of standard output from the offset that was asked for.
    #[serde(with = "serde_bytes")]
    pub stdout: Vec<u8>,
    /// Bytes of standard error from the offset that was asked for.
    #[serde(with = "serde_bytes")]
    pub stderr: Vec<u8>,
    /// Which holding wrote it; another epoch begins again at offset 0.
    pub epoch: i64,
}

impl Reply {
    /// An answer that says why nothing was done.
    pub fn refusal(error: impl Into<String>) -> Self {
        Reply { error: Some(error.into()), ..Reply::default() }
    }

    /// The message's body.
    pub fn encode(&self, encoding: Encoding) -> Vec<u8> {
        encode(self, encoding)
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`Error::Malformed`] when it is no reply.
    pub fn decode(body: &[u8], encoding: Encoding) -> Result<Self, Error> {
        decode(body, encoding)
    }
}

/// A change of a process's state, for whoever listens on `baton.event`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// The process.
    pub pid: Pid,
    /// Its new state, by its word.
    pub state: String,
    /// When, in microseconds since 1970 by the clock of the worker that says so.
    pub at: i64,
    /// The name of the worker or program that says so.
    pub by: String,
    /// The exit code, when it has ended with one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<i32>,
}

/// Many events of one state, as they are published.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Events {
    /// See [`VERSION`].
    pub version: u32,
    /// In the order in which they happened on the sender.
    pub events: Vec<Event>,
}

impl Events {
    /// The message's body.
    pub fn encode(&self, encoding: Encoding) -> Vec<u8> {
        encode(self, encoding)
    }
}

/// Why a message cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The body is not what its content type says, or a field has another type.
    #[error("malformed {encoding}: {reason}")]
    Malformed {
        /// What it was read as.
        encoding: &'static str,
        /// What the reader said.
        reason: String,
    },
    /// Written by a newer Baton.
    #[error("version {0} is newer than this program reads ({VERSION})")]
    Newer(u32),
    /// No such message.
    #[error("unknown type `{0}`")]
    UnknownType(String),
    /// A field is absent without which the message means nothing.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// Two fields exclude each other.
    #[error("`{0}` and `{1}` exclude each other")]
    Both(&'static str, &'static str),
    /// A selection that nothing can meet.
    #[error("`select`: {0}")]
    Select(String),
    /// Larger than any real message.
    #[error("{0} bytes are more than the limit of {SIZE_BYTES_MAX}")]
    TooLarge(usize),
}

/// The fields of every envelope. One flat map, so that a person can write it into the management UI's form. What says
/// which processes a request is about is never `null`: a sender that has lost its target must not reach more of them.
#[derive(Default, Serialize, Deserialize)]
#[serde(remote = "Self")]
struct Wire {
    version: u32,
    #[serde(rename = "type")]
    kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "by_name::given")]
    pid: Option<Pid>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    spec: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    wait: Option<bool>,
    #[serde(rename = "told_at", default, skip_serializing_if = "Option::is_none")]
    announced_at: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "by_name::given")]
    select: Option<Select>,
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "by_name::given")]
    fleet: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    stdout_offset: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    stderr_offset: Option<u64>,
}

by_name_only!(Wire, "a map with `version` and `type`");

impl Serialize for Wire {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Wire::serialize(self, serializer)
    }
}

impl Wire {
    fn new(kind: &str) -> Self {
        Wire { version: VERSION, kind: kind.to_owned(), ..Wire::default() }
    }

    fn decode(body: &[u8], encoding: Encoding) -> Result<Self, Error> {
        // The version is read first and alone: a newer envelope may have other fields.
        let Version { version } = decode(body, encoding)?;
        if version > VERSION {
            return Err(Error::Newer(version));
        }
        decode(body, encoding)
    }
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

fn encode<T: Serialize>(value: &T, encoding: Encoding) -> Vec<u8> {
    match encoding {
        Encoding::MessagePack => rmp_serde::to_vec_named(value).expect("messages have only string keys and plain data"),
        Encoding::Json => serde_json::to_vec(value).expect("messages have only string keys and plain data"),
    }
}

fn decode<'a, T: Deserialize<'a>>(body: &'a [u8], encoding: Encoding) -> Result<T, Error> {
    if body.len() > SIZE_BYTES_MAX {
        return Err(Error::TooLarge(body.len()));
    }
    match encoding {
        Encoding::MessagePack => message_pack::read(body)
            .map_err(|error| Error::Malformed { encoding: "MessagePack", reason: error.to_string() }),
        Encoding::Json => serde_json::from_slice(body)
            .map_err(|error| Error::Malformed { encoding: "JSON", reason: error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: [Encoding; 2] = [Encoding::MessagePack, Encoding::Json];

    #[test]
    fn tasks_come_back_as_they_were_sent_in_both_encodings() {
        let pid = Pid::generate();
        let tasks = [
            Task::Launch { pid, spec: Some(serde_json::json!({"run": ["true"]})), wait: true, announced_at: None },
            Task::Launch { pid, spec: None, wait: false, announced_at: Some(7) },
            Task::Continue { pid, announced_at: Some(1_700_000_000_000_000) },
        ];
        for encoding in BOTH {
            for task in &tasks {
                assert_eq!(Task::decode(&task.encode(encoding), encoding).unwrap(), *task);
            }
        }
    }

    #[test]
    fn controls_come_back_as_they_were_sent_in_both_encodings() {
        let pid = Pid::generate();
        let controls = [
            Control::Obey { verb: Desired::Kill, select: Select::default(), reason: Some("x".into()) },
            Control::Fleet { verb: Desired::Pause, reason: None },
            Control::Status(pid),
            Control::Output { pid, stdout_offset: 3, stderr_offset: 4 },
            Control::Ping,
            Control::Drain,
        ];
        for encoding in BOTH {
            for control in &controls {
                assert_eq!(Control::decode(&control.encode(encoding), encoding).unwrap(), *control);
            }
        }
    }

    #[test]
    fn what_cannot_be_used_says_why() {
        let cases: [(&str, &str); 8] = [
            ("", "malformed JSON"),
            ("[]", "malformed JSON"),
            (r#"{"type": "launch"}"#, "missing field `version`"),
            (r#"{"version": 2, "type": "launch"}"#, "version 2 is newer"),
            (r#"{"version": 1, "type": "dance"}"#, "unknown type `dance`"),
            (r#"{"version": 1, "type": "launch"}"#, "`pid` is missing"),
            (r#"{"version": 1, "type": "launch", "pid": "x"}"#, "malformed JSON"),
            (r#"{"version": 1, "type": "continue", "pid": 7}"#, "malformed JSON"),
        ];
        for (body, reason) in cases {
            let error = Task::decode(body.as_bytes(), Encoding::Json).unwrap_err().to_string();
            assert!(error.contains(reason), "{body}: {error}");
        }
    }

    #[test]
    fn deep_nesting_and_false_lengths_are_errors_not_crashes() {
        let deep = "[".repeat(100_000);
        assert!(Task::decode(deep.as_bytes(), Encoding::Json).is_err());
        assert!(Task::decode(&[0x91; 100_000], Encoding::MessagePack).is_err());
        let pid = rmp_serde::to_vec(&Pid::generate()).unwrap();
        let launch =
            |spec: &[u8]| [b"\x84\xa7version\x01\xa4type\xa6launch\xa3pid", &pid[..], b"\xa4spec", spec].concat();
        assert!(Task::decode(&launch(&[&[0x91; 100][..], &[0xc0]].concat()), Encoding::MessagePack).is_ok());
        assert!(Task::decode(&launch(&[&[0x91; 1_000][..], &[0xc0]].concat()), Encoding::MessagePack).is_err());
        // A map that claims four billion entries.
        assert!(Task::decode(&[0xdf, 0xff, 0xff, 0xff, 0xff], Encoding::MessagePack).is_err());
    }

    #[test]
    fn effects_come_back_and_later_ones_are_unknown() {
        for effect in Effect::ALL {
            let text = serde_json::to_string(&effect).unwrap();
            assert_eq!(serde_json::from_str::<Effect>(&text).unwrap(), effect);
        }
        assert_eq!(serde_json::from_str::<Effect>("\"teleported\"").unwrap(), Effect::Unknown);
    }

    #[test]
    fn fields_of_later_versions_are_ignored() {
        let pid = Pid::generate();
        let body = format!(r#"{{"version": 1, "type": "continue", "pid": "{pid}", "colour": "red"}}"#);
        assert!(Task::decode(body.as_bytes(), Encoding::Json).is_ok());
    }

    #[test]
    fn a_request_whose_target_is_lost_reaches_no_process() {
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
    fn a_person_pauses_the_fleet_with_an_empty_selection() {
        let body = br#"{"version": 1, "type": "pause", "select": {}, "reason": "maintenance"}"#;
        let control = Control::decode(body, Encoding::Json).unwrap();
        assert_eq!(
            control,
            Control::Obey { verb: Desired::Pause, select: Select::default(), reason: Some("maintenance".into()) }
        );
    }
}
