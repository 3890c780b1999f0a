//! The keys of programs that run on a site: where, with what, and which files come and go.

use std::collections::BTreeSet;

use super::super::on_site::{self, How, Input, Location, Needs, OnSite, Output, RESERVED, Scope, When};
use super::{
    Content, IN, Keys, NAME_BYTES_MAX, Node, OUT, Read, Reader, Section, boolean, is_made_of, no_nul, shortened, text,
    whole,
};
use crate::digest::Digest;
use crate::relative;

/// The keys that say something only together with a site.
const OF_SITES: [&str; 5] = ["native", "pre", "in", "out", "values"];
const NEEDS_OF_SITES: [&str; 5] = ["nodes", "ranks", "cpus", "mem", "gpus"];

/// Most of anything that is counted in `needs`.
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

/// The most memory that a spec may ask for: what is more is a slip of the pen.
const MEM_MAX: u64 = 1 << 60;

/// An entry of `in` or `out` as it is written.
struct Line {
    from: String,
    to: Option<String>,
    how: How,
    when: When,
    is_optional: bool,
}

impl Reader {
    /// `None` for a program on the worker's own machine, and together with a problem.
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
                self.complain(line, "`at` names a site, which applies to `run` and `script` only; remove it");
            }
            // What is wrong with `at` is told already, and what does not apply to `call` is, too.
            (Some(Some(_)), false) | (_, true) => {}
            (None, false) if is_named => {}
            (Some(None) | None, false) => self.refuse_what_needs_a_site(document, needs),
        }
        let inputs = self.lines(document, &IN, input);
        let outputs = self.lines(document, &OUT, output);
        self.refuse_what_meets(&inputs);
        if !has_session {
            let of_inputs = inputs.iter().flat_map(|(idx, line, input)| {
                [(*idx, *line, "in", input.from.scope), (*idx, *line, "in", input.to.scope)]
            });
            let of_outputs = outputs.iter().map(|(idx, line, output)| (*idx, *line, "out", output.to.scope));
            for (idx, line, key, _) in of_inputs.chain(of_outputs).filter(|(_, _, _, scope)| *scope == Scope::Session) {
                self.complain(
                    line,
                    format!("entry {idx} of `{key}`: session:// needs the key `session`, which names it"),
                );
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

    fn refuse_what_needs_a_site(&mut self, document: &Section, needs: &Section) {
        let of_document = OF_SITES.iter().map(|key| (document, *key));
        for (section, key) in of_document.chain(NEEDS_OF_SITES.iter().map(|key| (needs, *key))) {
            if let Some(node) = section.entries.get(key) {
                let shown = super::joined(section.path, key);
                self.complain(node.line, format!("`{shown}` needs a site; name it in `at`, such as `at: cluster`"));
            }
        }
    }

    /// The entries of `in` or `out`, each with its number and its line; each complains for itself.
    fn lines<T>(
        &mut self,
        document: &mut Section,
        keys: &Keys,
        read: impl Fn(Line) -> Read<T>,
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
            let Some(written) = self.line(keys, entry_idx, node) else { continue };
            match read(written) {
                Ok(entry) => entries.push((entry_idx, line, entry)),
                Err(problem) => self.complain(line, format!("entry {entry_idx} of `{key}`: {problem}")),
            }
        }
        entries
    }

    fn line(&mut self, keys: &Keys, entry_idx: usize, node: Node) -> Option<Line> {
        let (line, what) = (node.line, node.what());
        match node.content {
            Content::Text(text) => match arrow(&text) {
                Ok((from, to)) => {
                    Some(Line { from, to, how: How::default(), when: When::default(), is_optional: false })
                }
                Err(problem) => {
                    self.complain(line, format!("entry {entry_idx} of `{}`: {problem}", keys.path));
                    None
                }
            },
            Content::Map(entries) => {
                let mut section = self.section(keys, entries);
                if !section.has("from") && !section.has_refused {
                    self.complain(line, format!("entry {entry_idx} of `{}` has no `from`", keys.path));
                }
                let to = self.take(&mut section, "to", text);
                let how = self.take(&mut section, "how", how).unwrap_or_default();
                let when = self.take(&mut section, "when", when).unwrap_or_default();
                let is_optional = self.take(&mut section, "optional", boolean).unwrap_or_default();
                let from = self.take(&mut section, "from", text)?;
                Some(Line { from, to, how, when, is_optional })
            }
            Content::Null | Content::Bool(_) | Content::Number(_) | Content::List(_) => {
                let known = keys.known.join(", ");
                let text =
                    format!("entry {entry_idx} of `{}` must be text or a map (with {known}), not {what}", keys.path);
                self.complain(line, text);
                None
            }
        }
    }

    /// No two inputs go to one file, and none to a file that is a folder for another.
    fn refuse_what_meets(&mut self, inputs: &[(usize, Option<u32>, Input)]) {
        let mut files: BTreeSet<(&str, &str)> = BTreeSet::new();
        for (entry_idx, line, input) in inputs {
            let to = &input.to;
            if !to.is_folder() && !files.insert((to.scope.word(), to.path.as_str())) {
                self.complain(*line, format!("entry {entry_idx} of `in`: another entry goes to `{to}` already"));
            }
        }
        for (entry_idx, line, input) in inputs {
            let (scope, path) = (input.to.scope.word(), input.to.path.as_str());
            let mut above = path.match_indices('/').map(|(slash_idx, _)| &path[..slash_idx]);
            if let Some(file) = above.find(|above| files.contains(&(scope, *above))) {
                let problem = format!("`{}` lies below `{scope}://{file}`, to which another entry goes", input.to);
                self.complain(*line, format!("entry {entry_idx} of `in`: {problem}"));
            }
        }
    }
}

/// `FROM`, or `FROM > TO`.
fn arrow(text: &str) -> Read<(String, Option<String>)> {
    match text.split(" > ").map(str::trim).collect::<Vec<_>>().as_slice() {
        [from] => Ok(((*from).to_owned(), None)),
        [from, to] => Ok(((*from).to_owned(), Some((*to).to_owned()))),
        _ => Err(format!("`{}` has more than one ` > `; write from, to and how as a map", shortened(text))),
    }
}

fn input(line: Line) -> Read<Input> {
    let written = shortened(&line.from);
    let from = location(&line.from, None)?
        .ok_or_else(|| format!("`{written}` has no scope; write `client://{written}` for a file of yours"))?;
    match from.scope {
        Scope::Client | Scope::Session | Scope::Resource => {}
        Scope::Task => return Err(format!("`{written}`: nothing is in task:// before the program starts")),
        Scope::Store if from.path.parse::<Digest>().is_ok() => {}
        Scope::Store => return Err(format!("`{written}` must be store:// and a SHA-256 of 64 hexadecimal digits")),
    }
    if from.path.is_empty() {
        return Err(format!("`{written}` names no file; name one, or a folder with `/` at its end"));
    }
    let how = line.how;
    let is_shared = matches!(from.scope, Scope::Session | Scope::Resource);
    match how {
        How::Link | How::Move if !is_shared => {
            let word = if how == How::Link { "link" } else { "move" };
            return Err(format!(
                "`how: {word}` needs a source on the site, session:// or resource://; leave `how` out"
            ));
        }
        How::Unpack if from.is_folder() => {
            return Err(format!("`{written}` is a folder; `how: unpack` needs an archive"));
        }
        How::Auto | How::Copy | How::Link | How::Move | How::Unpack => {}
    }
    let to = match &line.to {
        Some(to) => target(to, Some(Scope::Task))?,
        None if how == How::Unpack => Location { scope: Scope::Task, path: String::new() },
        None if from.scope == Scope::Store => {
            return Err(format!("`{written}` needs a `to`: a digest is no name for a file"));
        }
        None => Location { scope: Scope::Task, path: base_name(&from.path).to_owned() },
    };
    match to.scope {
        Scope::Task | Scope::Session | Scope::Resource => {}
        Scope::Client => {
            return Err("`to` must not be client://; inputs go to task://, session:// or resource://".into());
        }
        Scope::Store => {
            return Err("`to` must not be store://; inputs go to task://, session:// or resource://".into());
        }
    }
    let is_folder = from.is_folder() || how == How::Unpack;
    let to =
        settled(
            to,
            is_folder,
            || {
                if from.scope == Scope::Store { None } else { Some(base_name(&from.path).to_owned()) }
            },
        )?;
    not_reserved(&to, &line.from)?;
    if to.path.is_empty() && matches!(how, How::Link | How::Move) {
        let word = if how == How::Link { "link" } else { "move" };
        let scope = to.scope.word();
        return Err(format!(
            "`how: {word}` cannot put a folder in the place of {scope}://; name a folder in `to`, or use copy"
        ));
    }
    Ok(Input { from, to, how, optional: line.is_optional })
}

fn output(line: Line) -> Read<Output> {
    let written = shortened(&line.from);
    let from = location(&line.from, Some(Scope::Task))?.expect("a scope is given");
    if from.scope != Scope::Task {
        return Err(format!("`{written}`: outputs come from task://, the program's own folder"));
    }
    if from.path.is_empty() {
        return Err(format!("`{written}` names no file; name one, a folder with `/` at its end, or `**` for all"));
    }
    let to = match &line.to {
        Some(to) => target(to, None)?,
        None => Location { scope: Scope::Store, path: String::new() },
    };
    let mut output = Output { from: from.path, to, how: line.how, when: line.when, optional: line.is_optional };
    match output.to.scope {
        Scope::Store if !output.to.path.is_empty() => {
            return Err("`to` must be store:// and nothing more: the store names files by their content".into());
        }
        Scope::Store if output.how != How::Auto => {
            return Err("`how` applies to session:// and resource:// only; leave it out".into());
        }
        Scope::Store | Scope::Session | Scope::Resource => {}
        Scope::Client => {
            let remedy = "leave `to` out, and fetch it by `baton results PID --get DIR`";
            return Err(format!("`to` must not be client://: nobody waits there when the program ends; {remedy}"));
        }
        Scope::Task => return Err("`to` must not be task://; outputs go to store://, session:// or resource://".into()),
    }
    match output.how {
        How::Auto | How::Copy | How::Move => {}
        How::Link => return Err("`how: link` would lead nowhere once the sandbox is removed; use copy or move".into()),
        How::Unpack => return Err("`how: unpack` applies to `in` only; use copy or move".into()),
    }
    let is_glob = output.is_glob();
    if is_glob {
        let pattern = on_site::glob(&output.from).map_err(|error| error.kind().to_string());
        pattern.map_err(|problem| format!("`{written}` is no pattern: {problem}"))?;
        if output.from.ends_with('/') {
            return Err(format!("`{written}`: a pattern is for files; write `{written}**`"));
        }
    }
    if output.to.scope != Scope::Store {
        if is_glob && !output.to.is_folder() {
            return Err(format!("several files may match `{written}`; end `to` with `/`"));
        }
        let is_folder = is_glob || output.from.ends_with('/');
        output.to = settled(output.to, is_folder, || Some(base_name(&output.from).to_owned()))?;
    }
    Ok(output)
}

/// A folder as the target of a file takes it in under its name, and the target of a folder is a folder.
fn settled(mut to: Location, is_folder: bool, name: impl FnOnce() -> Option<String>) -> Read<Location> {
    match (is_folder, to.is_folder()) {
        (true, false) => to.path.push('/'),
        (false, true) => match name() {
            Some(name) => to.path.push_str(&name),
            None => return Err("`to` is a folder; name the file, since a digest is no name".into()),
        },
        (true, true) | (false, false) => {}
    }
    Ok(to)
}

fn target(written: &str, default: Option<Scope>) -> Read<Location> {
    location(written, default)?.ok_or_else(|| {
        let shown = shortened(written);
        format!("`to` has no scope: `{shown}`; write `session://{shown}`, or leave it out")
    })
}

/// A path in a scope; `None` if it names none and none is the default.
fn location(written: &str, default: Option<Scope>) -> Read<Option<Location>> {
    let shown = shortened(written);
    let (scope, path) = match written.split_once("://") {
        None => match default {
            None => return Ok(None),
            Some(scope) => (scope, written),
        },
        Some((word, path)) => {
            // `scope:///path` is the same as `scope://path`, as for URLs without a host.
            (scope(word)?, path.strip_prefix('/').unwrap_or(path))
        }
    };
    let path = if path == "." || path == "./" { "" } else { path };
    let bare = path.strip_suffix('/').unwrap_or(path);
    if path == "/" || bare.starts_with('/') {
        return Err(format!("`{shown}` is absolute; a path is relative to its scope"));
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
        return Err(format!("`{shown}`: `{RESERVED}` in task:// belongs to Baton; take another name"));
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
            Err(format!("unknown scope `{}://`; there are {known}", shortened(word)))
        }
    }
}

/// The last part, with the `/` of a folder.
fn base_name(path: &str) -> &str {
    let bare = path.strip_suffix('/').unwrap_or(path);
    bare.rfind('/').map_or(path, |slash_idx| &path[slash_idx + 1..])
}

/// A site's name, or `None` for the worker's own machine.
fn site(node: Node) -> Read<Option<String>> {
    let name = text(node)?;
    if !is_made_of(&name, NAME_BYTES_MAX, |c| c.is_ascii_alphanumeric() || "._-".contains(c)) {
        return Err(format!(
            "must be `here` or a site's name, 1 to {NAME_BYTES_MAX} of A-Z, a-z, 0-9, `.`, `_` and `-`, not `{}`",
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
        .ok_or_else(|| format!("must be a whole number from {least} to {COUNT_MAX}"))
}

fn mem(node: Node) -> Read<u64> {
    let units = || UNITS.map(|(unit, _)| unit).join(", ");
    let written = match &node.content {
        Content::Text(text) => text.trim().to_owned(),
        Content::Number(number) => number.to_string(),
        Content::Null | Content::Bool(_) | Content::List(_) | Content::Map(_) => {
            return Err(format!("must be memory such as `32GiB`, not {}", node.what()));
        }
    };
    let shown = shortened(&written);
    let n_digits = written.find(|c: char| !c.is_ascii_digit()).unwrap_or(written.len());
    let (number, unit) = written.split_at(n_digits);
    if unit.is_empty() {
        return Err(format!("is wrong: `{shown}` has no unit; write `{shown}GiB`, or one of {}", units()));
    }
    let factor = UNITS.iter().find(|(known, _)| *known == unit.trim_start()).map(|(_, factor)| *factor);
    match (number.parse::<u64>(), factor) {
        (Ok(number), Some(factor)) => {
            let bytes = number.checked_mul(factor).filter(|bytes| (1..=MEM_MAX).contains(bytes));
            bytes.ok_or_else(|| "must be more than nothing and at most 1 EiB".to_owned())
        }
        (Ok(_), None) | (Err(_), _) => {
            Err(format!("is wrong: `{shown}` is no memory; write a whole number with {}", units()))
        }
    }
}

fn shell_lines(node: Node) -> Read<Vec<String>> {
    let Content::List(nodes) = node.content else {
        return Err(format!("must be a list of shell lines such as [module load gcc], not {}", node.what()));
    };
    let one_line = |(line_idx, node): (usize, Node)| {
        let line = text(node).map_err(|problem| format!("has a line {line_idx} that {problem}"))?;
        no_nul(&line).map_err(|problem| format!("has a line {line_idx} that {problem}"))?;
        if line.contains('\n') {
            return Err(format!("has a line {line_idx} that must not contain a line break; make it two"));
        }
        Ok(line)
    };
    nodes.into_iter().enumerate().map(one_line).collect()
}

fn values(node: Node) -> Read<String> {
    let written = text(node)?;
    let place = location(&written, Some(Scope::Task))?.expect("a scope is given");
    if place.scope != Scope::Task || place.is_folder() {
        return Err(format!("must be a file in task://, not `{}`", shortened(&written)));
    }
    Ok(place.path)
}
