#!/usr/bin/env bash
# Fetches what `make test-browser` needs of Debian, Chromium and a font, into a folder of its own: nothing is installed.
#
#   tools/browser_packages.sh FOLDER
#
# FOLDER/bin/chromium starts it with its own libraries and fonts. Exit code 1, with one line, where it could not be had
# (Ubuntu has Chromium only as a snap): then the tests take a Chromium or Chrome of the path, or one named by CHROMIUM.
set -euo pipefail

folder=${1:?which folder? tools/browser_packages.sh FOLDER}
unpack() {
  "$(dirname "$0")/debian_packages.sh" --with-dependencies "$folder" Chromium "$1" fonts-dejavu-core
}
unpack chromium-headless-shell 2>/dev/null || unpack chromium # older Debians have only the latter
folder=$(cd "$folder" && pwd)
if [ -x "$folder/bin/chromium" ]; then
  exit 0
fi

program=$(find "$folder/usr/lib/chromium" -name 'chromium*' -type f -perm -u+x 2>/dev/null | sort | tail -n 1)
if [ -z "$program" ]; then
  echo "the package chromium of this machine's archive has no program: name one by CHROMIUM=/path/to/chromium" >&2
  exit 1
fi
libraries=$(find "$folder/usr/lib" -name '*.so*' -not -path "$folder/usr/lib/chromium/*" -printf '%h\n' | sort -u | paste -sd:)
cat >"$folder/fonts.conf" <<EOS
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "urn:fontconfig:fonts.dtd">
<fontconfig>
  <dir>$folder/usr/share/fonts</dir>
  <cachedir>$folder/fontcache</cachedir>
  <alias><family>sans-serif</family><prefer><family>DejaVu Sans</family></prefer></alias>
  <alias><family>system-ui</family><prefer><family>DejaVu Sans</family></prefer></alias>
  <alias><family>monospace</family><prefer><family>DejaVu Sans Mono</family></prefer></alias>
</fontconfig>
EOS
mkdir -p "$folder/bin"
cat >"$folder/bin/chromium" <<EOS
#!/bin/sh
export LD_LIBRARY_PATH="$libraries" FONTCONFIG_FILE="$folder/fonts.conf"
exec "$program" "\$@"
EOS
chmod +x "$folder/bin/chromium"
