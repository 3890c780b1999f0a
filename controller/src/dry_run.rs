//! `baton submit --dry-run`: prints what would be submitted and, for a site, the files that the program would find.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::ffi::OsStrExt;

use baton_common::digest::Digest;
use baton_common::objects::Objects;
use baton_common::relative::BytePath;
use baton_common::spec::on_site::{How, Input, Needs, OnSite, Output as Kept, Scope, When};
use baton_common::spec::{Spec, Work};
use baton_common::{duration, objects};
use baton_worker::cli::Resolved;
use baton_worker::site::job_script;
use futures_util::{StreamExt, TryStreamExt};
use indicatif::HumanBytes;
use serde_json::{Value, json};

use crate::capture::{self, ClientFile, ClientFolder, Plan};
use crate::cli::{Global, Output};
use crate::client::objects_of;
use crate::failure::Failure;
use crate::output;

/// A client file, and whether it would be sent.
struct Fate<'a> {
    file: &'a ClientFile,
    digest: Digest,
    is_sent: bool,
}

/// Prints what would be submitted. Stores nothing and does not use the database.
pub(crate) async fn show(
    global: &Global,
    resolved: &Resolved,
    spec: &Spec,
    plan: &Plan,
    count: u32,
) -> Result<(), Failure> {
    let mut value = json!({"count": count, "kind": spec.kind(), "queue": spec.task_queue(), "spec": spec});
    let Some(on_site) = &spec.on_site else { return output::print_json(&value) };
    value["script"] = json!(resolved.config.sites.get(&on_site.at).map(|site| job_script(spec, site)));
    let objects = if plan.files.is_empty() { None } else { Objects::open_existing(&objects_of(global, resolved)?)? };
    let fates = fates(plan, objects.as_ref()).await?;
    match global.output {
        Output::Json => {
            value["staging"] = staging_json(&fates);
            output::print_json(&value)
        }
        Output::Table | Output::Ids => {
            output::print(&describe(spec, on_site, count))?;
            output::print(&tree(on_site, &fates, &plan.folders))?;
            match resolved.config.sites.get(&on_site.at) {
                Some(site) => output::print(&format!("\nJob script:\n\n{}", job_script(spec, site))),
                None => output::print("\nJob script: unknown, because the configuration does not have the site"),
            }
        }
    }
}

/// Hashes the files and looks them up in the object store.
async fn fates<'a>(plan: &'a Plan, objects: Option<&Objects>) -> Result<Vec<Fate<'a>>, Failure> {
    let bar = output::progress_bar(plan.total_bytes(), "read");
    let digests: Vec<Digest> = futures_util::stream::iter(&plan.files)
        .map(|file| async {
            let path = file.source.clone();
            let hashed = tokio::task::spawn_blocking(move || Digest::of_file(&path)).await;
            let (digest, _) = hashed
                .map_err(|error| Failure::failed(error.to_string()))?
                .map_err(|source| objects::Error::File { path: file.source.clone(), source })?;
            bar.inc(file.size);
            Ok::<_, Failure>(digest)
        })
        .buffered(capture::FILES_AT_ONCE)
        .try_collect()
        .await?;
    bar.finish_and_clear();
    let distinct: BTreeSet<Digest> = digests.iter().copied().collect();
    let mut absent: BTreeSet<Digest> = futures_util::stream::iter(distinct)
        .map(|digest| async move {
            let is_there = match objects {
                Some(objects) => objects.has(digest).await?,
                None => false,
            };
            Ok::<_, Failure>((digest, is_there))
        })
        .buffered(capture::FILES_AT_ONCE)
        .try_filter_map(|(digest, is_there)| std::future::ready(Ok((!is_there).then_some(digest))))
        .try_collect()
        .await?;
    // Of several equal files, only the first is sent.
    let fates =
        plan.files.iter().zip(digests).map(|(file, digest)| Fate { file, digest, is_sent: absent.remove(&digest) });
    Ok(fates.collect())
}

fn staging_json(fates: &[Fate]) -> Value {
    let files: Vec<Value> = fates
        .iter()
        .map(|fate| {
            let source = BytePath::from(fate.file.source.as_os_str().as_bytes().to_vec());
            let mut value = json!({
                "from": source.to_string(),
                "to": fate.file.to.to_string(),
                "how": fate.file.how,
                "size": fate.file.size,
                "executable": fate.file.is_executable,
                "digest": fate.digest,
                "sent": fate.is_sent,
            });
            match source.as_str() {
                Some(text) => value["from"] = json!(text),
                None => value["from_hex"] = json!(source.to_hex()),
            }
            value
        })
        .collect();
    let (n_sent, sent_bytes) = sent(fates);
    json!({"files": files, "sent": {"files": n_sent, "bytes": sent_bytes}})
}

fn sent(fates: &[Fate]) -> (usize, u64) {
    let sent = || fates.iter().filter(|fate| fate.is_sent);
    (sent().count(), sent().map(|fate| fate.file.size).sum())
}

fn describe(spec: &Spec, on_site: &OnSite, count: u32) -> String {
    let how_many = if count == 1 { String::new() } else { format!(", {count} processes") };
    let mut lines = vec![format!("{} at {}, queue {}{how_many}", spec.effective_name(), on_site.at, spec.task_queue())];
    match &spec.what {
        Work::Run { argv } => lines.push(format!("  run      {}", argv.join(" "))),
        Work::Script { text } => lines.push(format!("  script   {} lines", text.lines().count())),
        Work::Call { name, .. } => lines.push(format!("  call     {name}")),
    }
    let needs = needs(spec, &on_site.needs);
    if !needs.is_empty() {
        lines.push(format!("  needs    {}", needs.join(", ")));
    }
    lines.extend(on_site.native.iter().map(|(name, value)| format!("  native   {name} {value}").trim_end().to_owned()));
    lines.extend(on_site.pre.iter().map(|line| format!("  pre      {line}")));
    lines.join("\n")
}

fn needs(spec: &Spec, needs: &Needs) -> Vec<String> {
    let counts = [("nodes", needs.nodes), ("ranks", needs.ranks), ("cpus", needs.cpus), ("gpus", needs.gpus)];
    let counts = counts.into_iter().filter_map(|(what, count)| Some(format!("{} {what}", count?)));
    let mem = needs.mem.map(|bytes| format!("{} mem", HumanBytes(bytes)));
    let time = spec.time.map(|time| format!("{} time", duration::format(time)));
    counts.chain(mem).chain(time).collect()
}

/// Formats the files that the program finds, by scope, and the files that are kept afterwards.
fn tree(on_site: &OnSite, fates: &[Fate], folders: &[ClientFolder]) -> String {
    let mut scopes: BTreeMap<&str, BTreeMap<String, String>> = BTreeMap::new();
    let mut put = |scope: Scope, path: &str, note: String| {
        let places = scopes.entry(scope.word()).or_default();
        let notes = places.entry(path.to_owned()).or_default();
        *notes = if notes.is_empty() { note } else { format!("{notes}; {note}") };
    };
    for Fate { file, is_sent, .. } in fates {
        let what =
            if file.how == How::Unpack { format!("contents of {}, ", file.source.display()) } else { String::new() };
        let how = if *is_sent { "to be sent" } else { "already stored" };
        put(file.to.scope, &file.to.path.to_string(), format!("{what}{}, {how}", HumanBytes(file.size)));
    }
    for folder in folders {
        put(folder.to.scope, &format!("{}/", folder.to.path), "empty folder".to_owned());
    }
    for input in on_site.inputs.iter().filter(|input| input.from.scope != Scope::Client) {
        put(input.to.scope, &input.to.path, of_site(input));
    }
    let mut lines = Vec::new();
    for (scope, places) in &scopes {
        lines.push(format!("{scope}://"));
        branches(places, &mut lines);
    }
    if !on_site.outputs.is_empty() || on_site.values.is_some() {
        lines.push("kept afterwards".to_owned());
    }
    lines.extend(on_site.outputs.iter().map(kept));
    lines.extend(on_site.values.iter().map(|path| format!("  {path}  read as the values")));
    let (n_sent, sent_bytes) = sent(fates);
    let total_bytes = fates.iter().map(|fate| fate.file.size).sum();
    lines.push(format!(
        "{} local files, {}; {n_sent} of them to be sent, {}",
        fates.len(),
        HumanBytes(total_bytes),
        HumanBytes(sent_bytes)
    ));
    lines.join("\n")
}

/// Formats sorted paths as a tree, with each folder once.
fn branches(places: &BTreeMap<String, String>, lines: &mut Vec<String>) {
    let mut shown: BTreeSet<String> = BTreeSet::new();
    for (path, note) in places {
        let bare = path.trim_end_matches('/');
        let folders = bare.match_indices('/').map(|(slash_idx, _)| &bare[..slash_idx]);
        for folder in folders.filter(|folder| !folder.is_empty()) {
            if shown.insert(folder.to_owned()) {
                lines.push(branch(folder, "/", ""));
            }
        }
        let is_folder = path.ends_with('/');
        shown.extend(is_folder.then(|| bare.to_owned()));
        lines.push(branch(bare, if is_folder { "/" } else { "" }, note));
    }
}

fn branch(path: &str, end: &str, note: &str) -> String {
    let depth = path.matches('/').count() + 1;
    let name = path.rsplit('/').next().unwrap_or(path);
    let name = if name.is_empty() { ".".to_owned() } else { format!("{name}{end}") };
    format!("{}{name}  {note}", "  ".repeat(depth)).trim_end().to_owned()
}

fn of_site(input: &Input) -> String {
    let how = match input.how {
        How::Auto => "from",
        How::Copy => "a copy of",
        How::Link => "a link to",
        How::Move => "moved from",
        How::Unpack => "contents of",
    };
    let optional = if input.optional { ", if it exists" } else { "" };
    format!("{how} {}{optional}", input.from)
}

fn kept(output: &Kept) -> String {
    let when = match output.when {
        When::Ok => "",
        When::Error => ", after a failure",
        When::Always => ", in any case",
    };
    let how = match output.how {
        How::Move => ", moved",
        How::Auto | How::Copy | How::Link | How::Unpack => "",
    };
    let optional = if output.optional { ", if it exists" } else { "" };
    format!("  {}  to {}{how}{when}{optional}", output.from, output.to)
}
