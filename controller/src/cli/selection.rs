//! Options that select processes.

use std::collections::BTreeMap;
use std::time::Duration;

use baton_common::duration;
use baton_common::select::Select;
use clap::Args;

use crate::failure::Failure;

/// Heading of these options in the help.
pub(crate) const SELECTION: &str = "Selection (conditions are ANDed)";

/// Conditions that select processes. Conditions are ANDed.
#[derive(Args, Debug)]
#[command(next_help_heading = SELECTION)]
pub(crate) struct Selection {
    #[command(flatten)]
    pub(crate) facts: Facts,
    /// Only processes in one of these states, separated by commas
    #[arg(long, value_delimiter = ',', value_parser = clap::builder::PossibleValuesParser::new(baton_common::state::WORDS))]
    pub(crate) state: Vec<String>,
    /// Only processes that this worker holds
    #[arg(long, value_name = "NAME")]
    pub(crate) worker: Option<String>,
    /// Only processes that were accepted at least this long ago, such as 12h or 30d
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    pub(crate) older_than: Option<Duration>,
}

/// Properties of a process that are set when it is accepted and never change.
#[derive(Args, Debug)]
#[command(next_help_heading = SELECTION)]
pub(crate) struct Facts {
    /// Only processes with this label; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = label)]
    pub(crate) label: Vec<(String, String)>,
    /// Only processes in this session
    #[arg(long, value_name = "NAME")]
    pub(crate) session: Option<String>,
    /// Only processes in this queue; the name includes the class: `default`, `default.high`
    #[arg(long, value_name = "QUEUE")]
    pub(crate) queue: Option<String>,
    /// Only processes of this kind: `program`, `job`, or the name of a Rust process such as `baton.count`
    #[arg(long, value_name = "KIND")]
    pub(crate) kind: Option<String>,
}

impl Facts {
    /// Converts the options to a selection in the database.
    ///
    /// # Errors
    /// One label has two values. No process has two values of one label.
    pub(crate) fn select(self) -> Result<Select, Failure> {
        let mut labels = BTreeMap::new();
        for (key, value) in self.label {
            if let Some(other) = labels.insert(key.clone(), value.clone())
                && other != value
            {
                let text = format!("`--label {key}={other}` and `--label {key}={value}` exclude each other");
                return Err(Failure::usage(text));
            }
        }
        Ok(Select {
            labels: (!labels.is_empty()).then_some(labels),
            session: self.session,
            queue: self.queue,
            kind: self.kind,
            ..Select::default()
        })
    }
}

impl Selection {
    /// Converts the options to a selection in the database.
    ///
    /// # Errors
    /// See [`Facts::select`].
    pub(crate) fn select(self) -> Result<Select, Failure> {
        let states = (!self.state.is_empty()).then_some(self.state);
        Ok(Select { states, worker: self.worker, older_than: self.older_than, ..self.facts.select()? })
    }
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("`{text}` is not KEY=VALUE"))?;
    Ok((key.to_owned(), value.to_owned()))
}
