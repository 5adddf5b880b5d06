#!/usr/bin/env bash
# Prepare a release, and show what it would be: version, dated changelog, source distribution, wheel, SBOM, site.
#   bash tools/release.sh 0.2.0                 # try everything in a copy; nothing here changes
#   bash tools/release.sh --commit 0.2.0        # the same, then commit version and changelog, and fill dist/
#   bash tools/release.sh --commit --tag 0.2.0  # and create the tag v0.2.0
# Nothing is pushed or uploaded. A tree with changes is refused. PYTHON names the interpreter (python3), whose pip
# fetches build, twine and cyclonedx-bom into an environment for the time of the run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"

fail() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

COMMIT='' TAG='' VERSION=''
for word in "$@"; do
    case $word in
        --commit) COMMIT=1 ;;
        --tag) TAG=1 ;;
        -*) fail "there is no option $word; see --help" ;;
        *) [[ -z $VERSION ]] || fail "one version is released at a time, not $VERSION and $word"; VERSION=$word ;;
    esac
done
[[ -n $VERSION ]] || fail "name the version: bash tools/release.sh 0.2.0"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
unset PYTHONPATH PYTHONHOME # another copy of the package must not answer for the wheel
NAME=v$VERSION
[[ -z $(git status --porcelain) ]] || fail "the tree has changes: commit or stash them" "$(git status --short | head -20)"
git rev-parse --quiet --verify "refs/tags/$NAME" >/dev/null && fail "the tag $NAME is there already"

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
git clone --quiet --no-hardlinks . "$WORK/source"

echo "== version and changelog"
export SOURCE_DATE_EPOCH
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(date +%s)}
changed=$("$PYTHON" "$WORK/source/tools/prepare_release.py" version "$VERSION" "$(date -u -d "@$SOURCE_DATE_EPOCH" +%F)")
if [[ $changed == changed ]]; then
    git -C "$WORK/source" -c user.name="$(git config user.name || echo release)" \
        -c user.email="$(git config user.email || echo release@localhost)" commit --quiet --all -m "Version $VERSION"
fi
if [[ -n $TAG && -z $COMMIT && $changed == changed ]]; then
    fail "a tag needs a commit of version $VERSION: add --commit"
fi
git -C "$WORK/source" diff --stat "$(git rev-parse HEAD)" HEAD
"$PYTHON" "$WORK/source/tools/prepare_release.py" notes "$VERSION" >"$WORK/notes.md"
echo "$(wc -l <"$WORK/notes.md") lines of notes"

echo "== source distribution and wheel"
"$PYTHON" -m venv "$WORK/build"
PIP=("$WORK/build/bin/python" -m pip --disable-pip-version-check --quiet)
"${PIP[@]}" install build twine cyclonedx-bom
"$PYTHON" "$WORK/source/tools/prepare_release.py" readme "$NAME" # of the package only; it is not committed
(cd "$WORK/source" && "$WORK/build/bin/python" -m build --outdir "$WORK/dist" .) >"$WORK/build.log" 2>&1 ||
    { cat "$WORK/build.log"; fail "the packages could not be built"; }
"$WORK/build/bin/python" -m twine check --strict "$WORK"/dist/*

echo "== the wheel in a clean environment, and what it brings (SBOM)"
"$PYTHON" -m venv --without-pip "$WORK/clean"
"${PIP[@]}" --python "$WORK/clean/bin/python" install "$WORK"/dist/*.whl
said=$("$WORK/clean/bin/mindformers-ckpt" --version)
[[ $said == *" $VERSION" || $said == *"version $VERSION" ]] || fail "the wheel says $said, not $VERSION"
rm -f "$WORK"/clean/lib/python*/site-packages/mindformers_ckpt-*.dist-info/direct_url.json # a path of this machine
"$WORK/build/bin/cyclonedx-py" environment --output-reproducible --output-format JSON \
    --output-file "$WORK/dist/mindformers_ckpt-$VERSION.cdx.json" "$WORK/clean/bin/python"
"$WORK/build/bin/python" "$WORK/source/tools/check_distributions.py" "$WORK/dist"

if [[ -f tools/site.sh ]]; then
    echo "== site"
    (cd "$WORK/source" && git checkout --quiet README.md && bash tools/site.sh >"$WORK/site.log" 2>&1) ||
        { tail -40 "$WORK/site.log"; fail "the site could not be built"; }
    tar -czf "$WORK/dist/mindformers_ckpt-$VERSION-site.tar.gz" -C "$WORK/source" site
fi

(cd "$WORK/dist" && sha256sum -- * >"$WORK/SHA256SUMS" && mv "$WORK/SHA256SUMS" .)
echo "== made"
(cd "$WORK/dist" && ls -l)
if [[ -z $COMMIT && -z $TAG ]]; then
    echo "Nothing here has changed. To make the release: bash tools/release.sh --commit --tag $VERSION"
    exit 0
fi
if [[ $changed == changed ]]; then
    git fetch --quiet "$WORK/source" HEAD
    git merge --quiet --ff-only FETCH_HEAD
    echo "Committed: $(git log -1 --format='%h %s')"
fi
mkdir -p dist
cp "$WORK"/dist/* dist/
if [[ -n $TAG ]]; then
    git tag --annotate --file "$WORK/notes.md" --cleanup=verbatim "$NAME"
    echo "Tagged: $NAME"
fi
echo "The packages are in dist/. Next: git push --follow-tags, and twine upload dist/*.tar.gz dist/*.whl"
