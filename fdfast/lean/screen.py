"""The lexical screen: a proof is one term, so words that begin a command, a hole or an option have
no place in it.

The screen is the first of three walls (see `checker`). It may refuse an odd honest proof but must
not pass a dishonest one. It is no lexer of Lean: where Lean's would have to be known to the letter,
it refuses or counts more than Lean would:

* comments are blanked up to the first string, character or `«name»` delimiter outside a comment.
  From there on nothing is blanked and forbidden words count wherever they stand;
* a comment that Lean's longest match may read as symbols is refused: `<--1` is `<-` and `-1` to
  Lean, `//-x` is `//` and `-x`;
* a number glued to a word (`0b1open`) is refused, since where the number ends is a matter of Lean's
  lexer.
"""

import re

MAX_PROOF_CHARS = 4 << 20

_HOLES = {"sorry", "admit", "sorryAx"}
_COMMAND_WORDS = """
    abbrev add_decl_doc alias attribute axiom binder_predicate builtin_initialize class coinductive
    constant declare_config_elab declare_syntax_cat def deriving dsimproc dsimproc_decl elab
    elab_rules end example export extend_docs gen_injective_theorems grind_pattern import include
    inductive infix infixl infixr init_quot initialize instance irreducible_def lemma local macro
    macro_rules meta module mutual namespace noncomputable nonrec notation notation3 omit opaque
    partial postfix prefix prelude private protected public register_option run_cmd run_elab
    run_meta scoped seal section set_option simproc simproc_decl structure suppress_compilation
    syntax theorem unif_hint universe universes unsafe unseal variable variables
    """
_COMMANDS = set(_COMMAND_WORDS.split())
_EXECUTING = {"by_elab", "dbg_trace", "include_str", "native_decide", "run_tac", "eval%"}
# Refused also as the last part of a longer name: they are proofs of anything, or trust in compiled
# code.
_TRUST = {
    "sorryAx",
    "lcProof",
    "lcUnreachable",
    "ofReduceBool",
    "ofReduceNat",
    "trustCompiler",
    "reduceBool",
    "reduceNat",
}
_EXECUTING_COMMANDS = """
    builtin_initialize command_elab csimp declare_config_elab dsimproc dsimproc_decl elab elab_rules
    extern implemented_by initialize macro macro_rules register_option run_cmd run_elab run_meta
    simproc simproc_decl term_elab unsafe
    """
# Words that are names too, and forge only as the attribute's own.
_ATTRIBUTE = re.compile(
    r'(?:@\[|\battribute\s*\[)(?:"(?:\\.|[^"\\])*"|\[[^\]]{0,400}\]|[^\]"]){0,400}?'
    r"(?<![\w.'!?])(?P<name>«?(?:init|tactic|builtin_\w+|(?:app_)?(?:delab|unexpander)|parenthesizer|formatter|\w+_parser)»?)(?![\w'!?])"
)
# `unsafeCast` and its kin.
_UNSAFE = re.compile(r"unsafe[A-Z]")
# What could forge a result from a file's own context: everything else there is an honest
# definition.
_CONTEXT = _EXECUTING | set(_EXECUTING_COMMANDS.split())
# Names of axioms that a proof may use: no axiom of the file's own may pass for one of them.
_AXIOM_NAMES = {"propext", "choice", "sound"}
_AXIOM = re.compile(r"(?<![A-Za-z_])axiom(?![\w'!?])")
_AXIOM_NAME = re.compile(r"\s*(?P<name>(?:«[^»]*»|[^\s:({\[⦃«])+)")
# The kernel runs compiled code for constants of these names.
_CONTEXT_TRUST = {"ofReduceBool", "ofReduceNat", "reduceBool", "reduceNat", "trustCompiler"}

# ASCII only: any other letter ends a word here, so no exotic letter or superscript can hide the
# beginning of one.
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_'!?]*%?(?:\.[A-Za-z_][A-Za-z0-9_'!?]*)*")
_TOKEN = re.compile(rf"(?P<word>{_WORD.pattern})|[0-9]+")
_OPEN_IN = re.compile(r"open\b[^\n]*?\bin\b")
# Limits alone: with more time or depth a false proof is none the truer.
_LIMIT_IN = re.compile(
    r"set_option\s+(?:maxHeartbeats|maxRecDepth|synthInstance\.(?:maxHeartbeats|maxSize))\s+[0-9]+\s+in\b"
)
_STRICT_FROM = '"«'
# The characters that make a symbol with the first one of a comment's opening: `<-`, `//`, `\\/`.
_JOINING = {"--": "<", "/-": "/\\"}
_OUTSIDE = re.compile(r"--|/-|[\"«']")
_NOT_NEWLINE = re.compile(r"[^\n]")
_IN_COMMENT = re.compile(r"/-|-/")


def blank_comments(text: str) -> tuple[str, str]:
    """Replace comments by spaces (newlines stay), up to the first string or `«` outside a comment.

    Returns:
        The text, and what is wrong with its comments ("" if nothing).
    """
    out: list[str] = []
    i, depth, start = 0, 0, 0
    while (match := (_IN_COMMENT if depth else _OUTSIDE).search(text, i)) is not None:
        mark, at = match.group(), match.start()
        between = text[i:at]
        out.append(_NOT_NEWLINE.sub(" ", between) if depth else between)
        i = match.end()
        if depth:
            depth += 1 if mark == "/-" else -1
            out.append("  ")
        elif mark in _JOINING and _last(out) in _JOINING[mark]:
            return "".join(out) + text[at:], f"ambiguous comment: `{_last(out)}{mark}`"
        elif mark == "/-" and text[i : i + 1] in ("-", "!"):
            return "".join(out) + text[at:], "documentation comment"
        elif mark == "/-":
            start, depth = at, 1
            out.append("  ")
        elif mark == "--":
            i = text.find("\n", at)
            i = len(text) if i < 0 else i
            out.append(" " * (i - at))
        elif mark in _STRICT_FROM or _is_quote(text, at):
            return "".join(out) + text[at:], ""
        else:
            out.append(mark)
    if depth:
        out.append(_NOT_NEWLINE.sub(" ", text[i:]))
        return "".join(out), f"unclosed comment, opened in line {text.count(chr(10), 0, start) + 1}"
    return "".join(out) + text[i:], ""


def _last(out: list[str]) -> str:
    """The last character of what was put out, \0 if there is none."""
    return next((part[-1] for part in reversed(out) if part), "\0")


def _is_quote(text: str, i: int) -> bool:
    """Whether a character literal may begin here: a quote that does not end a name like `h'`."""
    return text[i] == "'" and not (i and (text[i - 1].isalnum() or text[i - 1] in "_'!?»"))


def refuse_proof(proof: str) -> str:
    """Return why the text cannot be an honest proof term, or "" if the screen finds nothing."""
    if reason := refuse_text(proof):
        return reason
    if not proof.strip():
        return "the proof is empty"
    code, fault = blank_comments(proof)
    if fault:
        return fault
    if not code.strip():
        return "the proof is empty: it has only comments"
    if match := re.search(r"@\[|#[a-z_]{2,}", code):
        return f"`{match.group()}` in the proof"
    for token in _TOKEN.finditer(code):
        if token.lastgroup == "word":
            if reason := _refuse_word(code, token):
                return reason
        elif _WORD.match(code, token.end()):
            shown = code[token.start() : token.end() + 8].split()[0]
            return f"a number glued to a word: `{shown}`"
    return ""


def _refuse_word(code: str, word: re.Match[str]) -> str:
    """Why this word may not stand in a proof, or ""."""
    name, start = word.group(), word.start()
    if (last := name.rsplit(".", 1)[-1]) in _TRUST or _UNSAFE.match(last):
        return "sorry" if name.endswith("sorryAx") else f"`{name}` in the proof"
    # `(f x).end` is a projection. `f ..end` is not, and neither is `1.end`.
    if start >= 2 and code[start - 1] == "." and code[start - 2] in ")⟩]":
        return ""
    if name in _HOLES:
        return "sorry"
    if name == "open" and not _OPEN_IN.match(code, start):
        return "`open` in the proof"
    if name == "set_option" and _LIMIT_IN.match(code, start):
        return ""
    if name in _COMMANDS or name in _EXECUTING:
        return f"`{name}` in the proof"
    return ""


def refuse_text(text: str) -> str:
    """Return why Lean cannot be given this text at all, or ""."""
    if len(text) > MAX_PROOF_CHARS:
        return f"the text has {len(text)} characters; at most {MAX_PROOF_CHARS} are read"
    if "\0" in text:
        return "the text has a NUL byte"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"the text is no Unicode: lone surrogate at character {error.start}"
    return ""


def documentation_as_comments(text: str) -> str:
    """Turn documentation comments into plain ones of the same length, which can be blanked."""
    return re.sub(r"/-[-!](?!/)", "/- ", text)


def refuse_context(context: str) -> str:
    """Return why a header or the earlier part of a file cannot be trusted as context, or ""."""
    if reason := refuse_text(context):
        return reason
    code, fault = blank_comments(documentation_as_comments(context))
    if fault:
        return fault
    if match := re.search(r"\bdebug\.\w+|\bskipKernelTC\b|#(?:exit|eval)\b", code):
        return f"`{match.group()}` above the theorem"
    for word in _WORD.finditer(code):
        if (
            word.group() in _CONTEXT
            or word.group().startswith("builtin_")
            or word.group().rsplit(".", 1)[-1] in _CONTEXT_TRUST
        ):
            return f"`{word.group()}` above the theorem"
    if match := _ATTRIBUTE.search(code):
        return f"`{match['name']}` above the theorem"
    for axiom in _AXIOM.finditer(code):
        # Blanked from here, since below a string `code` still has the comments.
        name = _AXIOM_NAME.match(blank_comments(code[axiom.end() : axiom.end() + 4096])[0])
        last = name["name"].rstrip(".").rsplit(".", 1)[-1].strip("«»") if name else ""
        if name is None or last in _AXIOM_NAMES:
            return f"`axiom {last}` above the theorem"
    return ""
