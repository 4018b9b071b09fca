#!/usr/bin/env bash
# Takes away everything that a test made below its own directory, and nothing else: processes that carry
# HOLDFAST_TEST_DIR=<directory> in their environment (their FUSE connections are aborted first: a request without a server
# hangs for ever), mounts below the directory, loop devices over files in it or over the FUSE files of those processes.
# Prints one line for each thing that it found.
#
#   sweep.sh DIRECTORY           now
#   sweep.sh --watch DIRECTORY   when standard input ends, that is when the test process is gone; then removes DIRECTORY
set -u
watch=
if [ "$1" = --watch ]; then
  watch=yes
  shift
fi
dir=$1
case $dir in
  /*/*) ;;
  *) echo "sweep.sh: refusing the directory $dir" >&2; exit 2 ;;
esac
if [ -n "$watch" ]; then
  trap '' INT TERM HUP
  cat >/dev/null
fi

pids=()
loops=()
for environ in /proc/[0-9]*/environ; do
  pid=${environ#/proc/}
  pid=${pid%/environ}
  [ "$pid" = $$ ] && continue
  if grep -qzxF "HOLDFAST_TEST_DIR=$dir" "$environ" 2>/dev/null; then
    # An ended process that its parent has not waited for yet is no leak.
    [ "$(awk '{ sub(/.*\) /, ""); print $1 }' "/proc/$pid/stat" 2>/dev/null)" = Z ] && continue
    pids+=("$pid")
    echo "process $pid: $(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | cut -c1-160)"
    for fd in /proc/"$pid"/fd/*; do
      device=$(readlink "$fd" 2>/dev/null)
      # A loop device over the file of a FUSE server that dies now (its own mount is detached, so the path says nothing).
      [[ $device =~ ^/dev/loop[0-9]+$ && $(cat "/sys/block/${device#/dev/}/loop/backing_file" 2>/dev/null) == / ]] && loops+=("$device")
    done
    for fdinfo in /proc/"$pid"/fdinfo/*; do
      connection=$(sed -n 's/^fuse_connection:[[:space:]]*//p' "$fdinfo" 2>/dev/null)
      [ -n "$connection" ] && echo 1 2>/dev/null >"/sys/fs/fuse/connections/$connection/abort"
    done
  fi
done
if [ ${#pids[@]} -gt 0 ]; then
  kill -KILL "${pids[@]}" 2>/dev/null
  sleep 0.5
fi

# Field 5 is the mount point, with octal escapes; the last mounted goes first.
while read -r mountpoint; do
  printf -v path '%b' "${mountpoint//\\/\\0}"
  case $path in
    "$dir"/*)
      echo "mount $path"
      umount "$path" 2>/dev/null || umount -l "$path" 2>/dev/null
      ;;
  esac
done < <(awk '{ print $5 }' /proc/self/mountinfo | tac)

for backing in /sys/block/loop*/loop/backing_file; do
  [ -r "$backing" ] || continue
  case $(cat "$backing" 2>/dev/null) in
    "$dir"/*)
      device=${backing#/sys/block/}
      device=/dev/${device%%/*}
      echo "loop device $device over $(cat "$backing" 2>/dev/null)"
      losetup -d "$device" 2>/dev/null
      ;;
  esac
done

for device in $(printf '%s\n' "${loops[@]}" | sort -u); do
  losetup -d "$device" 2>/dev/null && echo "loop device $device of an ended FUSE server"
done

[ -n "$watch" ] && rm -rf --one-file-system "$dir"
exit 0
