//! Hides the passwords of a program: other users can read its environment and its command line.
//!
//! A program cannot change the environment and the arguments that the system shows for it. So it executes itself again
//! without them and hands them over in a file in memory. It is not dumpable from the start, so only root can read its
//! memory and its open files.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use baton_common::secrets::{self, KEYS, URLS};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use serde::{Deserialize, Serialize};

use super::SELF;

/// The variable with the descriptor of the file in memory, which is useless to other programs.
const MARK: &str = "BATON_HANDOVER";

/// The replacement of a URL in the arguments.
const HIDDEN: &str = "(hidden)";

/// The original arguments.
static ARGUMENTS: OnceLock<Vec<OsString>> = OnceLock::new();

/// The content of the file.
#[derive(Serialize, Deserialize)]
struct Handover {
    /// The process id, which an exec does not change. A child may have inherited the variable.
    pid: u32,
    arguments: Vec<Vec<u8>>,
    variables: BTreeMap<String, String>,
}

/// Hides the passwords of this program. Returns its original arguments with the URLs of the environment added. Call it
/// first in `main`, before any thread starts. It may execute the program again instead of returning.
pub(crate) fn begin() -> Vec<OsString> {
    // This fails on no Linux, and it is only a second line of defence.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let handed = handed_over();
    let (given, variables) = match handed {
        Some(Handover { arguments, variables, .. }) => {
            (arguments.into_iter().map(OsString::from_vec).collect::<Vec<_>>(), variables)
        }
        None => {
            let given: Vec<OsString> = std::env::args_os().collect();
            let variables: BTreeMap<String, String> = URLS
                .into_iter()
                .map(|(name, _)| name)
                .chain(KEYS)
                .filter_map(|name| Some((name.to_owned(), std::env::var(name).ok()?)))
                .collect();
            let hidden = hidden(&given);
            if !variables.is_empty() || hidden != given {
                let failure = start_again(&given, &hidden, variables.clone());
                let _ = writeln!(io::stderr(), "warning: passwords stay in environment and arguments: {failure}");
            }
            (given, variables)
        }
    };
    // Not earlier: the arguments may name an inherited descriptor, which must survive the exec.
    keep_inherited();
    let given = ARGUMENTS.get_or_init(|| given).clone();
    let arguments = with_urls(given, &variables);
    secrets::keep(variables);
    arguments
}

/// Returns the original arguments.
pub(crate) fn arguments() -> Vec<String> {
    let given = ARGUMENTS.get().cloned().unwrap_or_else(|| std::env::args_os().collect());
    given.into_iter().map(|argument| argument.to_string_lossy().into_owned()).collect()
}

/// Marks inherited descriptors, except the three standard streams, as close-on-exec. They stay open in this program,
/// since one may hold a lock.
pub(crate) fn keep_inherited() {
    close_fds::set_fds_cloexec(3, &[]);
}

fn handed_over() -> Option<Handover> {
    let number: RawFd = std::env::var(MARK).ok()?.parse().ok()?;
    let text = fs::read(format!("/proc/self/fd/{number}")).ok()?;
    let handover: Handover = serde_json::from_slice(&text).ok()?;
    if handover.pid != std::process::id() {
        return None;
    }
    let _ = nix::unistd::close(number);
    Some(handover)
}

/// Executes this program again. Returns only if that fails.
fn start_again(arguments: &[OsString], hidden: &[OsString], variables: BTreeMap<String, String>) -> io::Error {
    let start = || -> io::Result<io::Error> {
        let names: Vec<String> = variables.keys().cloned().collect();
        let arguments = arguments.iter().map(|argument| argument.as_bytes().to_vec()).collect();
        let handover = Handover { pid: std::process::id(), arguments, variables };
        let mut file = File::from(memfd_create("handover", MemfdFlags::empty())?);
        file.write_all(&serde_json::to_vec(&handover)?)?;
        file.seek(SeekFrom::Start(0))?;
        let mut command = Command::new(program());
        if let Some((name, rest)) = hidden.split_first() {
            command.arg0(name).args(rest);
        }
        for name in names {
            command.env_remove(name);
        }
        Ok(command.env(MARK, file.as_raw_fd().to_string()).exec())
    };
    start().unwrap_or_else(|error| error)
}

/// The executable by its path, from which the system takes the name of the process; by [`SELF`] if the file is gone.
fn program() -> PathBuf {
    let path = std::env::current_exe().unwrap_or_default();
    if path.is_file() { path } else { PathBuf::from(SELF) }
}

/// The arguments without the URLs.
fn hidden(given: &[OsString]) -> Vec<OsString> {
    let mut is_value = false;
    let mut has_ended = false;
    given
        .iter()
        .map(|argument| {
            if std::mem::take(&mut is_value) {
                return HIDDEN.into();
            }
            has_ended |= argument == "--";
            let option = option_of(argument).filter(|_| !has_ended);
            match option {
                Some((option, true)) => format!("{option}={HIDDEN}").into(),
                Some((_, false)) => {
                    is_value = true;
                    argument.clone()
                }
                None => argument.clone(),
            }
        })
        .collect()
}

/// Returns the option if it takes a URL, and whether the argument contains the value too.
fn option_of(argument: &OsStr) -> Option<(&'static str, bool)> {
    let bytes = argument.as_bytes();
    URLS.iter().find_map(|(_, option)| match bytes.strip_prefix(option.as_bytes()) {
        Some([]) => Some((*option, false)),
        Some([b'=', ..]) => Some((*option, true)),
        Some(_) | None => None,
    })
}

/// The arguments, with the URLs that only the environment has.
fn with_urls(given: Vec<OsString>, variables: &BTreeMap<String, String>) -> Vec<OsString> {
    let before_end: Vec<&OsString> = given.iter().take_while(|argument| *argument != "--").collect();
    let is_given =
        |option| before_end.iter().any(|argument| option_of(argument).is_some_and(|(found, _)| found == option));
    let urls: Vec<OsString> = URLS
        .iter()
        .filter(|(_, option)| !is_given(*option))
        .filter_map(|(name, option)| Some(format!("{option}={}", variables.get(*name)?).into()))
        .collect();
    let mut given = given.into_iter();
    given.next().into_iter().chain(urls).chain(given).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn only_urls_are_hidden_in_the_arguments() {
        let given = words("baton --broker-url amqp://u:p@h list --database-url=postgres://u:p@h/d -n 3");
        let shown = words("baton --broker-url (hidden) list --database-url=(hidden) -n 3");
        assert_eq!(hidden(&given), shown);
        for text in ["baton list -n 3", "baton list -- --broker-url x", "baton --broker-url-file f list"] {
            assert_eq!(hidden(&words(text)), words(text));
        }
    }

    #[test]
    fn urls_of_the_environment_become_arguments_unless_given() {
        let variables = BTreeMap::from([("BATON_DATABASE_URL".to_owned(), "postgres://h/d".to_owned())]);
        let merged = with_urls(words("baton list"), &variables);
        assert_eq!(merged, words("baton --database-url=postgres://h/d list"));
        let given = words("baton list --database-url x");
        assert_eq!(with_urls(given.clone(), &variables), given);
    }
}
