//! The keys of programs that run on a site: the site, its resources, and the files to stage in and out.

use std::collections::BTreeSet;

use super::super::on_site::{self, How, Input, Location, Needs, OnSite, Output, RESERVED, Scope, When};
use super::value::{NAME_BYTES_MAX, Read, boolean, is_made_of, no_nul, shortened, text, whole};
use super::{Content, IN, Keys, Node, OUT, Reader, Section};
use crate::digest::Digest;
use crate::relative;

/// The keys that require a site.
const OF_SITES: [&str; 5] = ["native", "pre", "in", "out", "values"];
const NEEDS_OF_SITES: [&str; 5] = ["nodes", "ranks", "cpus", "mem", "gpus"];

/// Largest count in `needs`.
const COUNT_MAX: u32 = 1_000_000;

/// The units of memory, in bytes.
const UNITS: [(&str, u64); 9] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1_000),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

/// Maximum memory in a spec. More is a mistake.
const MEM_MAX: u64 = 1 << 60;

/// An entry of `in` or `out` as it is written.
struct Written {
    from: String,
    to: Option<String>,
    how: How,
    when: When,
    is_optional: bool,
}

impl Reader {
    /// Returns `None` for a program on the worker's own machine, and after reporting a problem.
    pub(super) fn on_site(
        &mut self,
        document: &mut Section,
        needs: &mut Section,
        is_call: bool,
        has_session: bool,
    ) -> Option<OnSite> {
        let (is_named, line) = (document.has("at"), document.entries.get("at").and_then(|node| node.line));
        let at = self.take(document, "at", site);
        match (&at, is_call) {
            (Some(Some(_)), true) => {
                self.report(line, "`at` with a site applies only to `run` and `script`; remove it");
            }
            // A problem with `at`, and keys that do not apply to `call`, are reported already.
            (Some(Some(_)), false) | (_, true) => {}
            (None, false) if is_named => {}
            (Some(None) | None, false) => self.reject_keys_that_need_a_site(document, needs),
        }
        let inputs = self.entries(document, &IN, input);
        let outputs = self.entries(document, &OUT, output);
        self.reject_conflicting_targets(&inputs);
        if !has_session {
            let of_inputs = inputs.iter().flat_map(|(idx, line, input)| {
                [(*idx, *line, "in", input.from.scope), (*idx, *line, "in", input.to.scope)]
            });
            let of_outputs = outputs.iter().map(|(idx, line, output)| (*idx, *line, "out", output.to.scope));
            for (idx, line, key, _) in of_inputs.chain(of_outputs).filter(|(_, _, _, scope)| *scope == Scope::Session) {
                self.report(line, format!("entry {idx} of `{key}`: session:// requires the key `session`"));
            }
        }
        let on_site = OnSite {
            at: at.flatten().unwrap_or_default(),
            needs: Needs {
                nodes: self.take(needs, "nodes", |node| count(&node, 1)),
                ranks: self.take(needs, "ranks", |node| count(&node, 1)),
                cpus: self.take(needs, "cpus", |node| count(&node, 1)),
                mem: self.take(needs, "mem", mem),
                gpus: self.take(needs, "gpus", |node| count(&node, 0)),
            },
            native: self
                .take_texts(document, "native", on_site::check_option, |_, value| on_site::check_option_value(value)),
            pre: self.take(document, "pre", shell_lines).unwrap_or_default(),
            inputs: inputs.into_iter().map(|(_, _, input)| input).collect(),
            staged: None,
            staged_version: 1,
            outputs: outputs.into_iter().map(|(_, _, output)| output).collect(),
            values: self.take(document, "values", values),
        };
        Some(on_site).filter(|on_site| !on_site.at.is_empty())
    }

    fn reject_keys_that_need_a_site(&mut self, document: &Section, needs: &Section) {
        let of_document = OF_SITES.iter().map(|key| (document, *key));
        for (section, key) in of_document.chain(NEEDS_OF_SITES.iter().map(|key| (needs, *key))) {
            if let Some(node) = section.entries.get(key) {
                let shown = super::joined(section.path, key);
                self.report(node.line, format!("`{shown}` requires a site; name one in `at`, such as `at: cluster`"));
            }
        }
    }

    /// Takes the entries of `in` or `out`, each with its index and line. Reports a problem for each invalid entry.
    fn entries<T>(
        &mut self,
        document: &mut Section,
        keys: &Keys,
        read: impl Fn(Written) -> Read<T>,
    ) -> Vec<(usize, Option<u32>, T)> {
        let key = keys.path;
        let nodes = self.take(document, key, |node| match node.content {
            Content::List(nodes) => Ok(nodes),
            Content::Null | Content::Bool(_) | Content::Number(_) | Content::Text(_) | Content::Map(_) => {
                Err(format!("must be a list of files such as [client://a.txt], not {}", node.what()))
            }
        });
        let mut entries = Vec::new();
        for (entry_idx, node) in nodes.unwrap_or_default().into_iter().enumerate() {
            let line = node.line;
            let Some(written) = self.entry(keys, entry_idx, node) else { continue };
            match read(written) {
                Ok(entry) => entries.push((entry_idx, line, entry)),
                Err(problem) => self.report(line, format!("entry {entry_idx} of `{key}`: {problem}")),
            }
        }
        entries
    }

    fn entry(&mut self, keys: &Keys, entry_idx: usize, node: Node) -> Option<Written> {
        let (line, what) = (node.line, node.what());
        match node.content {
            Content::Text(text) => match arrow(&text) {
                Ok((from, to)) => {
                    Some(Written { from, to, how: How::default(), when: When::default(), is_optional: false })
                }
                Err(problem) => {
                    self.report(line, format!("entry {entry_idx} of `{}`: {problem}", keys.path));
                    None
                }
            },
            Content::Map(entries) => {
                let mut section = self.section(keys, entries);
                if !section.has("from") && !section.has_rejected {
                    self.report(line, format!("entry {entry_idx} of `{}` has no `from`", keys.path));
                }
                let to = self.take(&mut section, "to", text);
                let how = self.take(&mut section, "how", how).unwrap_or_default();
                let when = self.take(&mut section, "when", when).unwrap_or_default();
                let is_optional = self.take(&mut section, "optional", boolean).unwrap_or_default();
                let from = self.take(&mut section, "from", text)?;
                Some(Written { from, to, how, when, is_optional })
            }
            Content::Null | Content::Bool(_) | Content::Number(_) | Content::List(_) => {
                let known = keys.known.join(", ");
                let text = format!(
                    "entry {entry_idx} of `{}` must be text or a map with the keys {known}, not {what}",
                    keys.path
                );
                self.report(line, text);
                None
            }
        }
    }

    /// Rejects two inputs with the same target, and an input whose target lies below that of another.
    fn reject_conflicting_targets(&mut self, inputs: &[(usize, Option<u32>, Input)]) {
        let mut files: BTreeSet<(&str, &str)> = BTreeSet::new();
        for (entry_idx, line, input) in inputs {
            let to = &input.to;
            if !to.is_folder() && !files.insert((to.scope.word(), to.path.as_str())) {
                self.report(*line, format!("entry {entry_idx} of `in`: another entry has the target `{to}`"));
            }
        }
        for (entry_idx, line, input) in inputs {
            let (scope, path) = (input.to.scope.word(), input.to.path.as_str());
            let mut above = path.match_indices('/').map(|(slash_idx, _)| &path[..slash_idx]);
            if let Some(file) = above.find(|above| files.contains(&(scope, *above))) {
                let problem =
                    format!("the target `{}` lies below `{scope}://{file}`, the target of another entry", input.to);
                self.report(*line, format!("entry {entry_idx} of `in`: {problem}"));
            }
        }
    }
}

/// Splits `FROM > TO`; `TO` may be absent.
fn arrow(text: &str) -> Read<(String, Option<String>)> {
    match text.split(" > ").map(str::trim).collect::<Vec<_>>().as_slice() {
        [from] => Ok(((*from).to_owned(), None)),
        [from, to] => Ok(((*from).to_owned(), Some((*to).to_owned()))),
        _ => Err(format!("`{}` has more than one ` > `; use a map with from, to and how", shortened(text))),
    }
}

fn input(entry: Written) -> Read<Input> {
    let written = shortened(&entry.from);
    let from = location(&entry.from, None)?
        .ok_or_else(|| format!("`{written}` has no scope; write `client://{written}` for a local file"))?;
    match from.scope {
        Scope::Client | Scope::Session | Scope::Resource => {}
        Scope::Task => return Err(format!("`{written}`: task:// is empty before the program starts")),
        Scope::Store if from.path.parse::<Digest>().is_ok() => {}
        Scope::Store => {
            return Err(format!(
                "`{written}` must be store:// followed by a SHA-256 of 64 lower-case hexadecimal digits"
            ));
        }
    }
    if from.path.is_empty() {
        return Err(format!(
            "`{written}` names no file; add the path of a file, or of a directory with a trailing `/`"
        ));
    }
    let how = entry.how;
    let is_shared = matches!(from.scope, Scope::Session | Scope::Resource);
    match how {
        How::Link | How::Move if !is_shared => {
            let word = if how == How::Link { "link" } else { "move" };
            return Err(format!("`how: {word}` requires a source in session:// or resource://; remove `how`"));
        }
        How::Unpack if from.is_folder() => {
            return Err(format!("`{written}` is a directory; `how: unpack` requires an archive"));
        }
        How::Auto | How::Copy | How::Link | How::Move | How::Unpack => {}
    }
    let to = match &entry.to {
        Some(to) => target(to, Some(Scope::Task))?,
        None if how == How::Unpack => Location { scope: Scope::Task, path: String::new() },
        None if from.scope == Scope::Store => {
            return Err(format!("`{written}` requires `to`, since a digest is not a file name"));
        }
        None => Location { scope: Scope::Task, path: base_name(&from.path).to_owned() },
    };
    match to.scope {
        Scope::Task | Scope::Session | Scope::Resource => {}
        Scope::Client => {
            return Err("`to` must not be client://; use task://, session:// or resource://".into());
        }
        Scope::Store => {
            return Err("`to` must not be store://; use task://, session:// or resource://".into());
        }
    }
    let is_folder = from.is_folder() || how == How::Unpack;
    let to = completed(to, is_folder, || {
        if from.scope == Scope::Store { None } else { Some(base_name(&from.path).to_owned()) }
    })?;
    not_reserved(&to, &entry.from)?;
    if to.path.is_empty() && matches!(how, How::Link | How::Move) {
        let word = if how == How::Link { "link" } else { "move" };
        let scope = to.scope.word();
        return Err(format!("`how: {word}` cannot replace {scope}:// itself; name a directory in `to`, or use copy"));
    }
    Ok(Input { from, to, how, optional: entry.is_optional })
}

fn output(entry: Written) -> Read<Output> {
    let written = shortened(&entry.from);
    let from = location(&entry.from, Some(Scope::Task))?.expect("a scope is given");
    if from.scope != Scope::Task {
        return Err(format!("`{written}`: outputs must be in task://, the program's sandbox"));
    }
    if from.path.is_empty() {
        return Err(format!(
            "`{written}` names no file; add the path of a file, of a directory with a trailing `/`, or `**` for all files"
        ));
    }
    let to = match &entry.to {
        Some(to) => target(to, None)?,
        None => Location { scope: Scope::Store, path: String::new() },
    };
    let mut output = Output { from: from.path, to, how: entry.how, when: entry.when, optional: entry.is_optional };
    match output.to.scope {
        Scope::Store if !output.to.path.is_empty() => {
            return Err("`to` must be store:// without a path, since the store names files by their content".into());
        }
        Scope::Store if output.how != How::Auto => {
            return Err("`how` applies only to targets in session:// and resource://; remove it".into());
        }
        Scope::Store | Scope::Session | Scope::Resource => {}
        Scope::Client => {
            let remedy = "remove `to`, and fetch the output with `baton results PID --get DIR`";
            return Err(format!("`to` must not be client://: the client may be gone when the program ends; {remedy}"));
        }
        Scope::Task => return Err("`to` must not be task://; use store://, session:// or resource://".into()),
    }
    match output.how {
        How::Auto | How::Copy | How::Move => {}
        How::Link => return Err("`how: link` would dangle once the sandbox is removed; use copy or move".into()),
        How::Unpack => return Err("`how: unpack` applies only to `in`; use copy or move".into()),
    }
    let is_glob = output.is_glob();
    if is_glob {
        let pattern = on_site::glob(&output.from).map_err(|error| error.kind().to_string());
        pattern.map_err(|problem| format!("`{written}` is not a valid pattern: {problem}"))?;
        if output.from.ends_with('/') {
            return Err(format!("`{written}`: a pattern matches files only; write `{written}**`"));
        }
    }
    if output.to.scope != Scope::Store {
        if is_glob && !output.to.is_folder() {
            return Err(format!("`{written}` may match several files; add a trailing `/` to `to`"));
        }
        let is_folder = is_glob || output.from.ends_with('/');
        output.to = completed(output.to, is_folder, || Some(base_name(&output.from).to_owned()))?;
    }
    Ok(output)
}

/// Completes a target: a file goes into a target folder under its own name, and the target of a folder is a folder.
fn completed(mut to: Location, is_folder: bool, name: impl FnOnce() -> Option<String>) -> Read<Location> {
    match (is_folder, to.is_folder()) {
        (true, false) => to.path.push('/'),
        (false, true) => match name() {
            Some(name) => to.path.push_str(&name),
            None => return Err("`to` is a directory; add a file name, since a digest is not a file name".into()),
        },
        (true, true) | (false, false) => {}
    }
    Ok(to)
}

fn target(written: &str, default: Option<Scope>) -> Read<Location> {
    location(written, default)?.ok_or_else(|| {
        let shown = shortened(written);
        format!("`to` has no scope: `{shown}`; write `session://{shown}`, or remove `to`")
    })
}

/// Reads a path in a scope. Returns `None` if it has no scope and there is no default.
fn location(written: &str, default: Option<Scope>) -> Read<Option<Location>> {
    let shown = shortened(written);
    let (scope, path) = match written.split_once("://") {
        None => match default {
            None => return Ok(None),
            Some(scope) => (scope, written),
        },
        Some((word, path)) => {
            // `scope:///path` equals `scope://path`, as in URLs without a host.
            (scope(word)?, path.strip_prefix('/').unwrap_or(path))
        }
    };
    let path = if path == "." || path == "./" { "" } else { path };
    let bare = path.strip_suffix('/').unwrap_or(path);
    if path == "/" || bare.starts_with('/') {
        return Err(format!("`{shown}` is absolute; make it relative to its scope"));
    }
    if !path.is_empty() {
        relative::check(bare).map_err(|problem| format!("`{shown}` {problem}"))?;
    }
    let location = Location { scope, path: path.to_owned() };
    not_reserved(&location, written).map(|()| Some(location))
}

fn not_reserved(location: &Location, written: &str) -> Read<()> {
    if location.scope == Scope::Task && location.path.split('/').next() == Some(RESERVED) {
        let shown = shortened(written);
        return Err(format!("`{shown}`: `{RESERVED}` in task:// is reserved for Baton; use another name"));
    }
    Ok(())
}

fn scope(word: &str) -> Read<Scope> {
    let all = [Scope::Client, Scope::Task, Scope::Session, Scope::Resource, Scope::Store];
    match all.into_iter().find(|scope| scope.word() == word) {
        Some(scope) => Ok(scope),
        None if ["pilot", "step"].contains(&word) => Err(format!("`{word}://` is not supported by this version")),
        None => {
            let known = all.map(|scope| format!("{}://", scope.word())).join(", ");
            Err(format!("unknown scope `{}://`; the scopes are {known}", shortened(word)))
        }
    }
}

/// The last component, with the `/` of a folder.
fn base_name(path: &str) -> &str {
    let bare = path.strip_suffix('/').unwrap_or(path);
    bare.rfind('/').map_or(path, |slash_idx| &path[slash_idx + 1..])
}

/// Reads a site's name; `None` for the worker's own machine.
fn site(node: Node) -> Read<Option<String>> {
    let name = text(node)?;
    if !is_made_of(&name, NAME_BYTES_MAX, |c| c.is_ascii_alphanumeric() || "._-".contains(c)) {
        return Err(format!(
            "must be `here` or the name of a site, of 1 to {NAME_BYTES_MAX} characters of A-Z, a-z, 0-9, `.`, `_` and `-`, not `{}`",
            shortened(&name)
        ));
    }
    Ok(Some(name).filter(|name| name != "here"))
}

fn how(node: Node) -> Read<How> {
    match text(node)?.as_str() {
        "auto" => Ok(How::Auto),
        "copy" => Ok(How::Copy),
        "link" => Ok(How::Link),
        "move" => Ok(How::Move),
        "unpack" => Ok(How::Unpack),
        "template" => Err("`template` is not supported by this version".into()),
        other => Err(format!("must be auto, copy, link, move or unpack, not `{}`", shortened(other))),
    }
}

fn when(node: Node) -> Read<When> {
    match text(node)?.as_str() {
        "ok" => Ok(When::Ok),
        "error" => Ok(When::Error),
        "always" => Ok(When::Always),
        other => Err(format!("must be ok, error or always, not `{}`", shortened(other))),
    }
}

fn count(node: &Node, least: u32) -> Read<u32> {
    whole(node, i64::from(least), i64::from(COUNT_MAX))
        .and_then(|number| u32::try_from(number).ok())
        .ok_or_else(|| format!("must be an integer from {least} to {COUNT_MAX}"))
}

fn mem(node: Node) -> Read<u64> {
    let units = || UNITS.map(|(unit, _)| unit).join(", ");
    let written = match &node.content {
        Content::Text(text) => text.trim().to_owned(),
        Content::Number(number) => number.to_string(),
        Content::Null | Content::Bool(_) | Content::List(_) | Content::Map(_) => {
            return Err(format!("must be a size such as `32GiB`, not {}", node.what()));
        }
    };
    let shown = shortened(&written);
    let n_digits = written.find(|c: char| !c.is_ascii_digit()).unwrap_or(written.len());
    let (number, unit) = written.split_at(n_digits);
    if unit.is_empty() {
        return Err(format!("is invalid: `{shown}` has no unit; write `{shown}GiB`, or use one of {}", units()));
    }
    let factor = UNITS.iter().find(|(known, _)| *known == unit.trim_start()).map(|(_, factor)| *factor);
    match (number.parse::<u64>(), factor) {
        (Ok(number), Some(factor)) => {
            let bytes = number.checked_mul(factor).filter(|bytes| (1..=MEM_MAX).contains(bytes));
            bytes.ok_or_else(|| "must be more than 0 and at most 1 EiB".to_owned())
        }
        (Ok(_), None) | (Err(_), _) => {
            Err(format!("is invalid: `{shown}` is not a size; write an integer with one of {}", units()))
        }
    }
}

fn shell_lines(node: Node) -> Read<Vec<String>> {
    let Content::List(nodes) = node.content else {
        return Err(format!("must be a list of shell lines such as [module load gcc], not {}", node.what()));
    };
    let one_line = |(line_idx, node): (usize, Node)| {
        let line = text(node).map_err(|problem| format!("line {line_idx} {problem}"))?;
        no_nul(&line).map_err(|problem| format!("line {line_idx} {problem}"))?;
        if line.contains('\n') {
            return Err(format!("line {line_idx} must not contain a line break; split it"));
        }
        Ok(line)
    };
    nodes.into_iter().enumerate().map(one_line).collect()
}

fn values(node: Node) -> Read<String> {
    let written = text(node)?;
    let location = location(&written, Some(Scope::Task))?.expect("a scope is given");
    if location.scope != Scope::Task || location.is_folder() {
        return Err(format!("must be a file in task://, not `{}`", shortened(&written)));
    }
    Ok(location.path)
}
