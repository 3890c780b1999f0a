//! The modules that the code of a crate names, by `crate::`, `super::`, `self::` and the names of child modules, with
//! all re-exports resolved; modules of tests are skipped. The parser reads tokens, and only as much of the language as
//! paths need.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;

/// A place in the code that names another module of its crate.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Import {
    /// The file, relative to the root of the repository.
    pub(super) file: String,
    pub(super) line: usize,
    /// The importing module: the one at the top of the crate, or that of the file.
    pub(super) from: String,
    /// The module that is named, or that a re-export leads through.
    pub(super) to: String,
}

impl fmt::Display for Import {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {} imports {}", self.file, self.line, self.from, self.to)
    }
}

/// The absolute path of a module or of an item in it, without `crate`.
type Path = Vec<String>;

struct Word {
    text: String,
    line: usize,
}

/// A path in the code.
struct Named {
    path: Path,
    line: usize,
    /// The name that a `pub use` gives it, and its module.
    alias: Option<(Path, String)>,
}

/// All imports of a crate between its top-level modules. `sources` are the files below `src/`, with relative paths.
/// Imports of `lib.rs` and `main.rs` are skipped: they know all modules.
pub(super) fn imports(src: &str, sources: &[(String, String)]) -> Vec<Import> {
    let top = |path: &Path, _: &HashSet<Path>| path.first().map(|top| vec![top.clone()]);
    imports_between(src, sources, top)
}

/// All imports of a crate between the files of one of its top-level modules.
pub(super) fn imports_of_files(src: &str, module: &str, sources: &[(String, String)]) -> Vec<Import> {
    let file = |path: &Path, files: &HashSet<Path>| {
        let prefixes = (1..=path.len()).rev().map(|length| path[..length].to_vec());
        prefixes.take_while(|prefix| prefix[0] == module).find(|prefix| files.contains(prefix))
    };
    imports_between(src, sources, file)
}

/// All imports of a crate between the units that `unit_of` returns for a path, given the modules that have a file.
fn imports_between(
    src: &str,
    sources: &[(String, String)],
    unit_of: impl Fn(&Path, &HashSet<Path>) -> Option<Path>,
) -> Vec<Import> {
    let files: Vec<(&str, Path, Vec<Word>)> = sources
        .iter()
        .filter_map(|(path, text)| {
            let path = path.strip_prefix(src)?;
            Some((path, module_of(path), words(text)))
        })
        .collect();
    let modules: HashSet<Path> = files.iter().map(|(_, module, _)| module.clone()).collect();
    let named: Vec<(&str, &Path, Vec<Named>)> =
        files.iter().map(|(file, module, words)| (*file, module, paths(module, words, &modules))).collect();
    let aliases: HashMap<(Path, String), Path> = named
        .iter()
        .flat_map(|(_, _, named)| named)
        .filter_map(|named| Some((named.alias.clone()?, named.path.clone())))
        .collect();
    let mut imports = Vec::new();
    for (file, module, named) in &named {
        let Some(from) = unit_of(module, &modules) else { continue };
        for Named { path, line, .. } in named {
            let units = stops(path, &aliases).into_iter().filter_map(|stop| unit_of(&stop, &modules));
            for to in units.filter(|to| *to != from && modules.contains(to)) {
                let (file, from, to) = (format!("{src}{file}"), from.join("::"), to.join("::"));
                imports.push(Import { file, line: *line, from, to });
            }
        }
    }
    imports.sort();
    imports.dedup();
    imports
}

/// The top-level modules of the crate that have a file.
pub(super) fn tops(src: &str, sources: &[(String, String)]) -> HashSet<String> {
    let files = sources.iter().filter_map(|(path, _)| path.strip_prefix(src));
    files.filter_map(|path| module_of(path).into_iter().next()).collect()
}

fn module_of(path: &str) -> Path {
    let path = path.strip_suffix(".rs").unwrap_or(path);
    path.split('/').filter(|name| !["lib", "main", "mod"].contains(name)).map(str::to_owned).collect()
}

/// The targets of a path: the modules of the re-exports on the way, and the path after the last of them.
fn stops(path: &Path, aliases: &HashMap<(Path, String), Path>) -> Vec<Path> {
    let mut stops = Vec::new();
    let (mut at, mut rest) = (Path::new(), VecDeque::from(path.clone()));
    let mut n_hops = 0;
    while let Some(name) = rest.pop_front() {
        match aliases.get(&(at.clone(), name.clone())).filter(|_| n_hops < 20) {
            Some(target) => {
                n_hops += 1;
                rest = target.iter().cloned().chain(rest).collect();
                stops.push(std::mem::take(&mut at));
            }
            None => at.push(name),
        }
    }
    stops.push(at);
    stops
}

/// All paths that a file names. Modules within the file matter, since `super` has another meaning there.
fn paths(file: &Path, words: &[Word], modules: &HashSet<Path>) -> Vec<Named> {
    let word = |idx: usize| words.get(idx).map_or("", |word| word.text.as_str());
    let mut inner: Vec<(String, usize)> = Vec::new();
    let (mut depth, mut idx, mut found) = (0, 0, Vec::new());
    while idx < words.len() {
        let module = || file.iter().cloned().chain(inner.iter().map(|(name, _)| name.clone())).collect::<Path>();
        let before = if idx == 0 { "" } else { word(idx - 1) };
        match word(idx) {
            // Test code is not part of the crate.
            "mod" if word(idx + 2) == "{" && is_of_tests(&words[..idx]) => {
                let outer = depth;
                idx += 2;
                depth += 1;
                while depth > outer && idx + 1 < words.len() {
                    idx += 1;
                    depth = depth + usize::from(word(idx) == "{") - usize::from(word(idx) == "}");
                }
            }
            "mod" if word(idx + 2) == "{" => inner.push((word(idx + 1).to_owned(), depth)),
            "{" => depth += 1,
            "}" => {
                depth -= 1;
                inner.retain(|(_, opened)| *opened < depth);
            }
            // `use<..>` lists the captures of a type.
            "use" if word(idx + 1) != "<" => {
                let is_public = ["pub", ")"].contains(&before);
                let mut leaves = Vec::new();
                idx += 1;
                tree(words, &mut idx, &Path::new(), &mut leaves);
                for (path, name, line) in leaves {
                    if let Some(path) = absolute(&module(), &path, modules, true) {
                        found.push(Named { path, line, alias: is_public.then(|| (module(), name)) });
                    }
                }
            }
            "crate" | "super" if word(idx + 1) == "::" && before != "::" => {
                let line = words[idx].line;
                let mut path = vec![word(idx).to_owned()];
                while word(idx + 1) == "::" && is_name(word(idx + 2)) {
                    path.push(word(idx + 2).to_owned());
                    idx += 2;
                }
                found.extend(absolute(&module(), &path, modules, false).map(|path| Named { path, line, alias: None }));
            }
            name if word(idx + 1) == "::" && before != "::" => {
                let path = vec![name.to_owned(), word(idx + 2).to_owned()];
                let line = words[idx].line;
                found.extend(absolute(&module(), &path, modules, true).map(|path| Named { path, line, alias: None }));
            }
            _ => {}
        }
        idx += 1;
    }
    found
}

/// The paths of a `use`, each with its name and line. On return, `idx` is at the first word after the tree.
fn tree(words: &[Word], idx: &mut usize, prefix: &Path, leaves: &mut Vec<(Path, String, usize)>) {
    let mut path = prefix.clone();
    let line = words.get(*idx).map_or(0, |word| word.line);
    while let Some(Word { text, .. }) = words.get(*idx) {
        match text.as_str() {
            "{" => {
                *idx += 1;
                while words.get(*idx).is_some_and(|word| word.text != "}") {
                    tree(words, idx, &path, leaves);
                    assert!(
                        words.get(*idx).is_some_and(|word| ["}", ","].contains(&word.text.as_str())),
                        "line {line}"
                    );
                    *idx += usize::from(words[*idx].text == ",");
                }
                *idx += 1;
                return;
            }
            ";" | "," | "}" => break,
            "::" | "*" => {}
            "as" => {
                let name = words.get(*idx + 1).map_or_else(String::new, |word| word.text.clone());
                *idx += 2;
                leaves.push((path, name, line));
                return;
            }
            "self" if !path.is_empty() => {}
            name => path.push(name.to_owned()),
        }
        *idx += 1;
    }
    let name = path.last().cloned().unwrap_or_default();
    leaves.push((path, name, line));
}

/// A path from the root of the crate; `None` for a path of another crate.
fn absolute(module: &Path, path: &Path, modules: &HashSet<Path>, may_be_child: bool) -> Option<Path> {
    let mut rest = path.iter().peekable();
    let mut at = match rest.peek()?.as_str() {
        "crate" => Path::new(),
        "super" | "self" => module.clone(),
        name => {
            let child: Path = module.iter().cloned().chain([name.to_owned()]).collect();
            return (may_be_child && modules.contains(&child)).then(|| module.iter().chain(path).cloned().collect());
        }
    };
    while let Some(name) = rest.next_if(|name| ["crate", "super", "self"].contains(&name.as_str())) {
        if name == "super" {
            at.pop();
        }
    }
    at.extend(rest.cloned());
    Some(at)
}

/// Whether the words before a module restrict it to tests.
fn is_of_tests(before: &[Word]) -> bool {
    const ATTRIBUTE: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    before.len() >= ATTRIBUTE.len()
        && before[before.len() - ATTRIBUTE.len()..].iter().map(|word| &*word.text).eq(ATTRIBUTE)
}

fn is_name(word: &str) -> bool {
    word.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// Names, `::` and punctuation, without comments and quoted text.
fn words(text: &str) -> Vec<Word> {
    let chars: Vec<char> = text.chars().collect();
    let at = |idx: usize| chars.get(idx).copied().unwrap_or('\0');
    let (mut words, mut line, mut idx) = (Vec::new(), 1, 0);
    while idx < chars.len() {
        let begin = idx;
        let is_raw =
            at(idx) == 'r' && (at(idx + 1) == '"' || (at(idx + 1) == '#' && ['"', '#'].contains(&at(idx + 2))));
        match at(idx) {
            '/' if at(idx + 1) == '/' => idx += chars[idx..].iter().take_while(|c| **c != '\n').count(),
            '"' => idx = quoted(&chars, idx),
            _ if is_raw => {
                let n_signs = chars[idx + 1..].iter().take_while(|c| **c == '#').count();
                let end: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', n_signs)).collect();
                idx += 2 + n_signs;
                idx += chars[idx..].windows(end.len()).position(|some| some == end).unwrap_or(0) + end.len();
            }
            // Otherwise it is a lifetime, whose name is harmless.
            '\'' if at(idx + 1) == '\\' || at(idx + 2) == '\'' => {
                idx += 1 + usize::from(at(idx + 1) == '\\');
                idx += 1 + chars[idx + 1..].iter().take_while(|c| **c != '\'').count() + 1;
            }
            c if c.is_alphanumeric() || c == '_' => {
                while at(idx).is_alphanumeric() || at(idx) == '_' {
                    idx += 1;
                }
                words.push(Word { text: chars[begin..idx].iter().collect(), line });
            }
            ':' if at(idx + 1) == ':' => {
                words.push(Word { text: "::".to_owned(), line });
                idx += 2;
            }
            c => {
                if !c.is_whitespace() {
                    words.push(Word { text: c.to_string(), line });
                }
                idx += 1;
            }
        }
        line += chars[begin..idx.min(chars.len())].iter().filter(|c| **c == '\n').count();
    }
    words
}

/// The index after a string that begins here.
fn quoted(chars: &[char], begin: usize) -> usize {
    let mut idx = begin + 1;
    while idx < chars.len() && chars[idx] != '"' {
        idx += 1 + usize::from(chars[idx] == '\\');
    }
    idx + 1
}

#[test]
fn a_path_is_followed_through_groups_re_exports_and_modules_within_a_file() {
    let sources = [
        ("src/lib.rs", "mod low; mod middle; mod high; pub use high::{deep::{self as alias}, Thing};"),
        ("src/low.rs", "fn f() { let s = \"crate::high\"; crate::alias::run('{', r#\"crate::high \"#) }"),
        ("src/middle.rs", "pub(crate) use crate::low::Small;\nmod own { use super::super::high; }\nuse super::Thing;"),
        ("src/middle/part.rs", "//! crate::high\nuse super::{Small, super::low};\nuse std::high::X;"),
        (
            "src/high.rs",
            "use crate::{middle::{Small, part as p}, low};\n#[cfg(test)] mod tests { fn f() { crate::deep::X } }",
        ),
        ("src/high/deep.rs", "impl<'a> X<'a> { fn f() -> crate::middle::Small<crate::low::Y> {} }"),
    ];
    let sources = sources.map(|(path, text)| (path.to_owned(), text.to_owned()));
    let found: Vec<String> = imports("src/", &sources)
        .iter()
        .map(|import| format!("{}:{} {} {}", import.file, import.line, import.from, import.to))
        .collect();
    let wanted = [
        "src/high.rs:1 high low",
        "src/high.rs:1 high middle",
        "src/high/deep.rs:1 high low",
        "src/high/deep.rs:1 high middle",
        "src/low.rs:1 low high",
        "src/middle.rs:1 middle low",
        "src/middle.rs:2 middle high",
        "src/middle.rs:3 middle high",
        "src/middle/part.rs:2 middle low",
    ];
    assert_eq!(found, wanted);
}

#[test]
fn an_import_between_files_is_found_through_re_exports_and_paths_in_code() {
    let sources = [
        ("src/lib.rs", "mod room; mod other;"),
        ("src/other.rs", "pub(crate) struct X;"),
        ("src/room.rs", "mod ground; mod roof; pub use ground::Thing;"),
        ("src/room/ground.rs", "use crate::other::X;\npub(super) struct Thing;"),
        ("src/room/roof.rs", "mod part;\nuse super::Thing;\nfn f() { part::g() }"),
        ("src/room/roof/part.rs", "fn g(_: crate::room::roof::Y) {}"),
    ];
    let sources = sources.map(|(path, text)| (path.to_owned(), text.to_owned()));
    let found: Vec<String> = imports_of_files("src/", "room", &sources)
        .iter()
        .map(|import| format!("{}:{} {} {}", import.file, import.line, import.from, import.to))
        .collect();
    let wanted = [
        "src/room.rs:1 room room::ground",
        "src/room/roof.rs:2 room::roof room",
        "src/room/roof.rs:2 room::roof room::ground",
        "src/room/roof.rs:3 room::roof room::roof::part",
        "src/room/roof/part.rs:1 room::roof::part room::roof",
    ];
    assert_eq!(found, wanted);
}
