#compdef tpvpn
# Completion of tpvpn for zsh: `source <(tpvpn completion zsh)` behind compinit, or as _tpvpn into a directory of $fpath.
_tpvpn() {
    local -a found
    local line value files=0 cut=${words[(i)--]}
    if ((cut < CURRENT)); then # what stands behind it is another command line
        words=("${(@)words[cut+1,-1]}")
        ((CURRENT -= cut))
        _normal
        return
    fi
    for line in "${(@f)$("${(Q)words[1]}" __complete "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)}"; do
        value=${line%%$'\t'*}
        case $line in
        :0) files=1 ;;
        :*) ;;
        *$'\t'?*) found+=("${value//:/\\:}:${line#*$'\t'}") ;;
        *) found+=("${value//:/\\:}") ;;
        esac
    done
    if ((files)); then _files; else _describe -V tpvpn found; fi
}
if [[ ${funcstack[1]} == _tpvpn ]]; then _tpvpn "$@"; else compdef _tpvpn tpvpn; fi
