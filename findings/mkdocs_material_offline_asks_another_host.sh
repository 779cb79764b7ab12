#!/usr/bin/env bash
# mkdocs-material 9.8.2, its plugin offline, which is there for sites that are opened from a folder without a network: with it every
# page holds a script address of another host, unpkg.com/iframe-worker/shim, that the browser asks for. Without the plugin no
# page loads anything from elsewhere (theme.font: false). A strict build says nothing.
# Why it matters: turning offline on is what makes every reader's browser ask a third party, and behind a content policy or without
# a network the script that searching needs does not come. The cure: no such plugin, and serve the folder (python -m http.server).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "mkdocs-material==9.8.2" "mkdocs==1.6.1" 2>/dev/null
mkdir "$work/docs"
echo "# A page" >"$work/docs/index.md"
export NO_MKDOCS_2_WARNING=1
seen=""
for plugins in "[search]" "[search, offline]"; do
  printf 'site_name: a\ntheme: {name: material, font: false}\nplugins: %s\n' "$plugins" >"$work/mkdocs.yml"
  "$work/venv/bin/python" -m mkdocs build --quiet --strict --config-file "$work/mkdocs.yml" --site-dir "$work/site"
  seen+="$plugins: $(grep -o 'src="\?https://[a-z./-]*' "$work/site/index.html" | sed 's/src="\?//' || true)"$'\n'
done
printf '%s' "$seen"
grep -qx "\[search\]: " <<<"$seen"
grep -qx "\[search, offline\]: https://unpkg.com/iframe-worker/shim" <<<"$seen"
